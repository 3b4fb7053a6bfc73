"""What the README and the first pages show is run: shell commands, Python, links, make targets."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/getting-started.md"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def commands():
    """Each shell command of the pages, once."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                command = line.partition("  #")[0].strip()
                if command:
                    found.setdefault(command, page)
    return list(found)


def make(*arguments):
    # A make that started pytest would hand its options down.
    environment = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def targets():
    """Name and sentence of each target that ``make`` lists."""
    listing = make()
    assert listing.returncode == 0, listing.stderr
    return dict(line.split(maxsplit=1) for line in listing.stdout.splitlines())


def test_pages_show_commands():
    shown = commands()
    assert {"make demo", "make test"} <= set(shown)
    assert any("prestage replay" in command for command in shown)


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make")])
def test_make_commands_name_targets(command):
    # CI runs the targets themselves; here their recipes are only expanded.
    target = shlex.split(command)[1]
    assert target in targets()
    expanded = make("-n", *shlex.split(command)[1:])
    assert expanded.returncode == 0, expanded.stderr
    assert "scripts/setup.sh" in expanded.stdout


@pytest.mark.parametrize("command", [c for c in commands() if not c.startswith("make")])
def test_other_commands_run(command):
    words = shlex.split(command)
    (ROOT / "build").mkdir(exist_ok=True)  # As `make demo` does, which the page shows first.
    assert words[0] == ".venv/bin/prestage", f"The test does not know how to run {words[0]}"
    result = subprocess.run(
        [sys.executable, "-m", "prestage", *words[1:]], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page, tmp_path):
    for block in blocks(page, "python"):
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", block],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        assert result.stdout


def test_every_target_is_listed_with_a_sentence():
    listed = targets()
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert listed.keys() == set(phony[1].split())
    assert all(re.match(r"[A-Z].*\.$", sentence) for sentence in listed.values())


@pytest.mark.parametrize(
    "page",
    ["README.md", "CONTRIBUTING.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md"))],
)
def test_links_between_files_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not re.match(r"https?:", target):
            assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
