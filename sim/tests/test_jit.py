"""Machine code that is kept on disk."""

import os
import subprocess
import sys

_A = """
from prestage_sim._jit import compiled
from {package}.callee import inner

@compiled
def outer(x):
    return inner(x) + 1
"""
_B = """
from prestage_sim._jit import compiled

@compiled
def inner(x):
    return x * {factor}
"""


def test_a_change_of_a_called_function_in_another_file_counts(tmp_path):
    """Else a caller's machine code would go on doing what the callee did before."""
    package = tmp_path / "prestage_sim_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "caller.py").write_text(_A.format(package=package.name))
    program = f"from {package.name}.caller import outer; print(outer(3), outer.stats.cache_hits)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}

    def run():
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[0], "1" in done.stdout.split(None, 1)[1]

    (package / "callee.py").write_text(_B.format(factor=2))
    assert run() == ("7", False)
    assert run() == ("7", True)
    (package / "callee.py").write_text(_B.format(factor=5))
    assert run() == ("16", False)
