"""The check of the system's tools stops at once and names the command that installs them."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "check-tools.sh"
TOOLS = ("git", "make", "g++", "perl", "python3")

# A Python whose venv module works, and one without, as Debian's is before python3-venv comes.
PYTHON = (
    '#!/bin/sh\ncase "$*" in *sysconfig*|-) echo "{library}";; *ensurepip*) exit {venv};; esac\n'
)


@pytest.fixture
def check(tmp_path):
    """Run the script with only the given tools on PATH."""

    def run(*tools, extras="", python=None):
        folder = tmp_path / "bin"
        folder.mkdir()
        for tool in (*tools, "id"):
            if tool == "python3" and python is not None:
                (folder / tool).write_text(python)
                (folder / tool).chmod(0o755)
            else:
                (folder / tool).symlink_to(shutil.which(tool))
        environment = {"PATH": str(folder)}
        perl = os.environ.get("PERL5LIB")
        if perl:
            environment["PERL5LIB"] = perl
        return subprocess.run(
            ["/bin/sh", str(SCRIPT), extras], env=environment, capture_output=True, text=True
        )

    return run


def missing(result):
    assert result.returncode == 1
    first, second = result.stderr.splitlines()
    packages = first.removeprefix("Missing: ")
    assert second.removeprefix("Install with: ").removeprefix("sudo ") == (
        f"apt-get install {packages}"
    )
    return packages.split()


def test_all_tools(check):
    result = check(*TOOLS, python=PYTHON.format(library="", venv=0), extras="sim")
    assert (result.returncode, result.stdout, result.stderr) == (0, "python3\n", "")


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool != "python3"])
def test_one_is_missing(check, tool):
    rest = [other for other in TOOLS if other != tool]
    assert missing(check(*rest, python=PYTHON.format(library="", venv=0))) == [tool]


def test_python_is_missing(check):
    assert missing(check("git", "make", "g++", "perl")) == ["python3", "python3-venv"]


def test_venv_is_missing(check):
    assert missing(check(*TOOLS, python=PYTHON.format(library="", venv=1))) == ["python3-venv"]


def test_python_is_too_old(check):
    old = "#!/bin/sh\nexit 1\n"
    assert missing(check(*TOOLS, python=old)) == ["python3.11", "python3.11-venv"]


def test_benches_need_the_library_of_python(check):
    python = PYTHON.format(library="libpython3.11", venv=0)
    assert missing(check(*TOOLS, python=python, extras="hw,test")) == ["libpython3.11"]


def test_nothing_is_there(check):
    assert missing(check()) == ["git", "make", "g++", "perl", "python3", "python3-venv"]
