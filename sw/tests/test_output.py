"""Files that are written whole or not at all."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from prestage.output import OutputError, check_writable, write_file


def test_write(tmp_path):
    path = tmp_path / "file.txt"
    write_file(path, b"one", what="File")
    write_file(path, lambda file: file.write(b"two"), what="File")
    assert path.read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["file.txt"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_failure_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "file.txt"
    path.write_bytes(b"before")

    def half(file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OutputError, match="Report .*file.txt can't be written: No space left"):
        write_file(path, half, what="Report")
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file.txt"]


def test_full_device():
    with pytest.raises(OutputError, match="/dev/full can't be written: No space left on device"):
        write_file(Path("/dev/full"), b"x", what="Report")
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


def test_special_files_are_not_replaced(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        check_writable(path, what="File")
        write_file(path, b"through", what="File")
        assert os.read(reader, 100) == b"through"
    finally:
        os.close(reader)
    assert stat.S_ISFIFO(path.stat().st_mode)


def test_links_stay_links(tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real)
    write_file(link, b"one", what="File")
    write_file(link, b"two", what="File")
    assert link.is_symlink()
    assert real.read_bytes() == b"two"


def test_standard_output_is_not_replaced(tmp_path):
    before = os.readlink("/dev/stdout")
    program = "from pathlib import Path\nfrom prestage.output import write_file\n"
    program += "write_file(Path('/dev/stdout'), b'out', what='File')"
    with (tmp_path / "out").open("wb") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, check=True)
    assert (tmp_path / "out").read_bytes() == b"out"
    assert os.readlink("/dev/stdout") == before


def test_check_writable(tmp_path):
    check_writable(tmp_path / "new.txt", what="Report")
    with pytest.raises(OutputError, match="it is a directory"):
        check_writable(tmp_path, what="Report")
    with pytest.raises(OutputError, match="there is no directory .*nowhere"):
        check_writable(tmp_path / "nowhere" / "x", what="Report")


def test_permission(tmp_path, monkeypatch):
    # Root may write anywhere, so that a folder's own mode isn't enough.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="permission denied"):
        check_writable(tmp_path / "new.txt", what="Report")
