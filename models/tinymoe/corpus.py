"""Fetch and split the text that TinyMoE is trained on and recorded with.

The text comes from six Debian 12 packages and is not shipped. Every document carries a split:
about one in twenty, chosen by a hash of its name, is held out and never trained on.

Examples
--------
Download and unpack the packages, no root needed, then list what is in them::

    python models/tinymoe/corpus.py --fetch --root /tmp/tinymoe-corpus
    python models/tinymoe/corpus.py --root /tmp/tinymoe-corpus
"""

from __future__ import annotations

import argparse
import gzip
import re
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["DOMAINS", "PACKAGES", "Document", "documents", "fetch"]

DOMAINS = ("code", "prose")

# Package, version that the shipped weights were trained on, what is taken from it.
PACKAGES = (
    ("libpython3.11-stdlib", "3.11.2-6+deb12u9", "Python sources"),
    ("libpython3.11-minimal", "3.11.2-6+deb12u9", "Python sources"),
    ("r-cran-janeaustenr", "1.0.0-1", "six novels"),
    ("bible-kjv-text", "4.38", "King James Bible, packed"),
    ("bible-kjv", "4.38", "the program that unpacks it"),
    ("jargon-text", "4.4.7-4.1", "Jargon File"),
)

# Tables of numbers and generated help texts teach neither code nor prose.
_CODE_LEFT_OUT = re.compile(r"/(encodings/(cp|iso|koi|mac_|big5|euc)|pydoc_data/|_sysconfigdata)")
_HELD_OUT_ONE_IN = 20


@dataclass(frozen=True)
class Document:
    """One file or chapter.

    Parameters
    ----------
    domain : str
        One of :data:`DOMAINS`.
    name : str
        Unique name; its hash decides the split.
    text : bytes
        UTF-8 text.
    """

    domain: str
    name: str
    text: bytes

    @property
    def held_out(self) -> bool:
        """Whether the document is kept away from training."""
        return zlib.crc32(self.name.encode()) % _HELD_OUT_ONE_IN == 7


def fetch(root: Path) -> None:
    """Download and unpack the Debian packages below ``root`` with ``apt-get`` and ``dpkg-deb``.

    Parameters
    ----------
    root : Path
        Folder, made if absent. Each package is unpacked in a folder of its own name.

    Raises
    ------
    subprocess.CalledProcessError
        If a package cannot be downloaded.
    """
    root.mkdir(parents=True, exist_ok=True)
    for package, version, _ in PACKAGES:
        # Another point release changes a few files at most, so it is taken where the exact
        # version has left the archive.
        exact = ["apt-get", "download", f"{package}={version}"]
        if subprocess.run(exact, cwd=root, check=False).returncode:
            subprocess.run(["apt-get", "download", package], cwd=root, check=True)
        archive = max(root.glob(f"{package}_*.deb"))
        target = root / package
        target.mkdir(exist_ok=True)
        subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)


def _python_sources(root: Path) -> list[Document]:
    result = []
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        base = root / package / "usr/lib/python3.11"
        for path in sorted(base.rglob("*.py")):
            name = "/" + path.relative_to(base).as_posix()
            # Left-out files come first: one of them is a link out of the package.
            if _CODE_LEFT_OUT.search(name) or path.stat().st_size < 200:
                continue
            result.append(Document("code", f"python3.11{name}", path.read_bytes()))
    return result


def _r_strings(blob: bytes) -> list[bytes]:
    """Strings of one serialized R character vector (XDR, version 3)."""
    native = struct.unpack(">I", blob[14:18])[0]
    at = 18 + native
    kind, count = struct.unpack(">II", blob[at : at + 8])
    if blob[:2] != b"X\n" or kind & 0xFF != 16:
        raise ValueError("R object must be a serialized character vector")
    at += 8
    lines = []
    for _ in range(count):
        size = struct.unpack(">i", blob[at + 4 : at + 8])[0]
        at += 8
        lines.append(blob[at : at + max(size, 0)])
        at += max(size, 0)
    return lines


def _novels(root: Path) -> list[Document]:
    path = root / "r-cran-janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    raw = path.read_bytes()
    result = []
    at = 0
    while at < len(raw):
        unpacker = zlib.decompressobj()
        lines = _r_strings(unpacker.decompress(raw[at + 4 :]))
        at = len(raw) - len(unpacker.unused_data)
        title = lines[0].decode().title()
        text = b"\n".join(lines).replace(b"\r", b"") + b"\n"
        chapters = re.split(rb"(?im)^(?=chapter [0-9ivxl]+)", text)
        result += [
            Document("prose", f"Austen/{title}/{number}", chapter)
            for number, chapter in enumerate(chapters)
            if len(chapter) > 500
        ]
    return result


def _bible(root: Path) -> list[Document]:
    base = root.resolve()
    printed = subprocess.run(
        [
            str(base / "bible-kjv/usr/bin/bible"),
            *("-f", "-p", str(base / "bible-kjv-text/usr/lib"), "gen1:1-rev22:21"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    chapters: dict[str, list[bytes]] = {}
    for line in printed.splitlines():
        place, _, verse = line.partition(b" ")
        chapter, _, number = place.decode().partition(":")
        chapters.setdefault(chapter, []).append(number.encode() + b" " + verse + b"\n")
    return [Document("prose", f"KJV/{name}", b"".join(v)) for name, v in chapters.items()]


def _jargon(root: Path) -> list[Document]:
    path = root / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz"
    text = gzip.decompress(path.read_bytes())
    # Contents and word lists come before the first entry and lie between the letters.
    text = text[text.index(b"\n   :") :]
    parts = [part for part in re.split(rb"\n(?=   :)", text) if len(part) > 80]
    result = []
    for first in range(0, len(parts), 12):
        joined = b"\n".join(parts[first : first + 12])
        result.append(Document("prose", f"Jargon/{first // 12}", joined))
    return result


def documents(root: Path) -> list[Document]:
    """Every document below ``root``, in a fixed order.

    Parameters
    ----------
    root : Path
        Folder that :func:`fetch` filled.

    Returns
    -------
    list of Document
        Both domains, training and held-out.

    Raises
    ------
    FileNotFoundError
        If a package is absent.
    """
    for package, _, _ in PACKAGES:
        if not (root / package).is_dir():
            raise FileNotFoundError(f"Package {package} must be unpacked in {root}: run --fetch")
    return _python_sources(root) + _novels(root) + _bible(root) + _jargon(root)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", type=Path, required=True, help="folder of unpacked packages")
    parser.add_argument("--fetch", action="store_true", help="download and unpack first")
    options = parser.parse_args()
    if options.fetch:
        fetch(options.root)
    everything = documents(options.root)
    for domain in DOMAINS:
        for held_out in (False, True):
            chosen = [d for d in everything if d.domain == domain and d.held_out == held_out]
            size = sum(len(d.text) for d in chosen)
            split = "held-out" if held_out else "training"
            print(f"{domain:6} {split}: {len(chosen):5} documents, {size:9,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
