"""Files derived from the contract: the C header, the register page and the message page.

``python -m prestage_hw.contract.generate`` writes them into the source tree; with ``--check`` it
only compares, and fails if one of them is stale.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from enum import IntEnum
from pathlib import Path

from . import records, wire
from .records import ERROR_TEXT, MESSAGES, RECORDS, REFUSAL_TEXT, Field, Record
from .registers import COUNTERS, DEVICE_ID, REGISTERS, VERSION, register_hash

__all__ = ["c_header", "generated_files", "main", "messages_page", "registers_page"]

_ENUMS: dict[str, type[IntEnum]] = {
    "Phase": records.Phase,
    "Source": records.Source,
    "ErrorCode": records.ErrorCode,
    "TrafficClass": records.TrafficClass,
    "Refusal": records.Refusal,
}

_SOURCE = "hw/prestage_hw/contract"


def _snake(name: str) -> str:
    """``CamelCase`` as ``snake_case``."""
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")


def _c_name(name: str) -> str:
    """Name of a field in C, where some names are taken."""
    return f"{name}_" if name in ("register",) else name


def _on_wire() -> list[Record]:
    """Records that are the body of a message, each once, in the order of the message codes."""
    found: dict[str, Record] = {}
    for message in sorted(MESSAGES.values(), key=lambda m: m.code):
        if message.record is not None:
            found.setdefault(message.record.name, message.record)
    return list(found.values())


def _array_at(record: Record) -> int | None:
    """Position of the first array field whose length depends on the configuration."""
    for at, field in enumerate(record.fields):
        if isinstance(field.count, str):
            return at
    return None


def _c_struct(record: Record) -> list[str]:
    at = _array_at(record)
    name = _snake(record.name)
    fields: Sequence[Field] = record.fields
    lines = ["", f"/* {record.description} */"]
    if at is not None:
        rest = ", ".join(
            f"uint{f.wire_bits}_t {_c_name(f.name)}" + (f"[{f.count}]" if f.count else "")
            for f in record.fields[at:]
        )
        lines.append(f"/* Followed by {rest}. */")
        name += "_head"
        fields = record.fields[:at]
    lines.append(f"struct prestage_{name} {{")
    for field in fields:
        length = "" if field.count is None else f"[{field.count}]"
        lines.append(
            f"    uint{field.wire_bits}_t {_c_name(field.name)}{length}; /* {field.description} */"
        )
    lines.append("};")
    return lines


def c_header() -> str:
    """Text of ``prestage.h``."""
    lines = [
        f"/* Generated from {_SOURCE} by python -m prestage_hw.contract.generate. */",
        "/* SPDX-License-Identifier: BSD-2-Clause */",
        "",
        "#ifndef PRESTAGE_H",
        "#define PRESTAGE_H",
        "",
        "#include <stdint.h>",
        "",
        "#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__",
        '#error "The structures below have the layout of the wire only on little-endian machines"',
        "#endif",
        "",
        "/* Identity. The host compares the registers of these names with them. */",
        f"#define PRESTAGE_DEVICE_ID 0x{DEVICE_ID:08x}u",
        f"#define PRESTAGE_VERSION 0x{VERSION:08x}u",
        f"#define PRESTAGE_REGISTER_HASH 0x{register_hash():08x}u",
        "",
        "/*",
        " * A frame is type, sequence, acknowledge (one byte each), the body and the CRC-32 of",
        " * IEEE 802.3 over all of them, least significant byte first; stuffed with COBS, ended by",
        " * a zero byte.",
        " */",
        f"#define PRESTAGE_FRAME_OVERHEAD {wire.FRAME_OVERHEAD}u",
        f"#define PRESTAGE_MAX_FRAME_BYTES {wire.MAX_FRAME_BYTES}u",
        "",
        "/* Words of a predictor table in one message. */",
        f"#define PRESTAGE_TABLE_BURST {records.TABLE_BURST}u",
        "/* Messages other than FETCHED that a device with a host mover has room for. */",
        f"#define PRESTAGE_HOST_MESSAGES {records.HOST_MESSAGES}u",
        "",
        "/* Token id where it isn't known. */",
        f"#define PRESTAGE_NO_TOKEN 0x{records.NO_TOKEN:08x}u",
        "",
        "/* Types of frames. */",
        "enum prestage_message {",
    ]
    for message in sorted(MESSAGES.values(), key=lambda m: m.code):
        way = "to the device" if message.to_device else "to the host"
        if message.code in (records.LINK_ACK, records.LINK_NAK):
            way = "both ways"
        lines.append(f"    PRESTAGE_{message.name} = 0x{message.code:02x}, /* {way} */")
    lines.append("};")
    for name, members in _ENUMS.items():
        lines += ["", f"enum prestage_{_snake(name)} {{"]
        for member in members:
            text = ""
            if isinstance(member, records.ErrorCode):
                text = f" /* {ERROR_TEXT[member]} */"
            elif isinstance(member, records.Refusal):
                text = f" /* {REFUSAL_TEXT[member]} */"
            lines.append(
                f"    PRESTAGE_{_snake(name).upper()}_{member.name} = {int(member)},{text}"
            )
        lines.append("};")
    lines += ["", "/* Register addresses, in 32-bit words. */", "enum prestage_register {"]
    for register in REGISTERS:
        lines.append(
            f"    PRESTAGE_REG_{register.name.upper()} = 0x{register.address:02x},"
            f" /* {register.access}: {register.description} */"
        )
    lines += ["};", "", "/* Bodies of the messages. */", "#pragma pack(push, 1)"]
    for record in _on_wire():
        lines += _c_struct(record)
    lines += ["", "#pragma pack(pop)", "", "#endif", ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in escaped),
    ]


_GENERATED = (
    f"<!-- Generated from {_SOURCE} by python -m prestage_hw.contract.generate; do not edit. -->"
)


def registers_page() -> str:
    """Text of ``registers.md``."""
    access = {"ro": "read-only", "rw": "read, write", "wo": "write-only"}
    rows = [
        [
            f"0x{r.address:02x}",
            f"`{r.name}`",
            access[r.access],
            "" if r.reset is None else (f"0x{r.reset:x}" if r.reset > 9 else str(r.reset)),
            r.description,
        ]
        for r in REGISTERS
    ]
    lines = [
        _GENERATED,
        "",
        "# Registers",
        "",
        "Registers are 32 bits wide and are read and written with the messages `REGISTER_READ` and",
        "`REGISTER_WRITE`. Addresses count 32-bit words. A read of a register that does not exist,",
        "and a write of one that may not be written, is answered with the event `BAD_REGISTER`.",
        "Where the reset value is empty, it depends on the configuration.",
        "",
        f"The hash of this list, which `register_hash` holds, is `0x{register_hash():08x}`: the",
        "CRC-32 over address, name, access and reset value of all registers.",
        "",
        *_table(("Address", "Name", "Access", "Reset", "Description"), rows),
        "",
        "## Refusals",
        "",
        "A write that makes no sense changes nothing and leaves its reason in `refusal`.",
        "",
        *_table(
            ("Reason", "Name", "Meaning"),
            [[str(int(r)), f"`{r.name}`", REFUSAL_TEXT[r]] for r in records.Refusal],
        ),
        "",
        "## Counters by stage",
        "",
        "The numbers are those of the stages of the data's way: 1 link, 2 predictor, 3 scheduler,",
        "4 DMA, 5 buffer. Counters wrap.",
        "",
    ]
    counters = [
        [str(stage), ", ".join(f"`{c.name}`" for c in COUNTERS if c.stage == stage)]
        for stage in sorted({c.stage for c in COUNTERS})
    ]
    return "\n".join([*lines, *_table(("Stage", "Counters"), counters), ""])


def _field_rows(record: Record) -> list[list[str]]:
    rows = []
    offset: int | None = 0
    for field in record.fields:
        bits = f"{field.kind}" if isinstance(field.kind, int) else f"*{field.kind}*"
        kind = f"u{field.wire_bits}"
        if field.count is not None:
            kind += f" x *{field.count}*" if isinstance(field.count, str) else f" x {field.count}"
        rows.append(
            [
                "" if offset is None else str(offset),
                f"`{field.name}`",
                kind,
                bits,
                field.description,
            ]
        )
        if offset is not None:
            length = 1 if field.count is None else field.count
            offset = None if isinstance(length, str) else offset + length * field.wire_bits // 8
    return rows


def messages_page() -> str:
    """Text of ``messages.md``."""
    head = ("Offset", "Field", "On the wire", "Bits in RTL", "Description")
    lines = [
        _GENERATED,
        "",
        "# Messages and records",
        "",
        "A frame is `type, sequence, acknowledge, body, crc`: one byte each for the first three,",
        "then the body, then the CRC-32 of IEEE 802.3 over everything before it. All numbers are",
        "little-endian. The frame is stuffed with COBS and ends with a zero byte. Before stuffing",
        f"it is at most {wire.MAX_FRAME_BYTES} bytes long, {wire.FRAME_OVERHEAD} of which are not"
        " body.",
        "",
        *_table(
            ("Type", "Message", "Way", "Body"),
            [
                [
                    f"0x{m.code:02x}",
                    f"`{m.name}`",
                    "both"
                    if m.code in (records.LINK_ACK, records.LINK_NAK)
                    else ("to the device" if m.to_device else "to the host"),
                    "none" if m.record is None else f"[{m.record.name}](#{m.record.name.lower()})",
                ]
                for m in sorted(MESSAGES.values(), key=lambda m: m.code)
            ],
        ),
        "",
        "## Errors",
        "",
        "The field `code` of an [Event](#event).",
        "",
        *_table(
            ("Code", "Name", "Meaning"),
            [[str(int(c)), f"`{c.name}`", ERROR_TEXT[c]] for c in records.ErrorCode],
        ),
        "",
        "## Bodies",
        "",
        "Widths in italics depend on the configuration: the RTL's are just wide enough for the",
        "number of contexts, layers, experts, slots and so on; *top_k* and *data_bytes* are",
        "lengths.",
    ]
    on_wire = _on_wire()
    for record in on_wire:
        lines += ["", f"### {record.name}", "", record.description, ""]
        lines += _table(head, _field_rows(record))
    lines += [
        "",
        "`phase` is 0 prefill, 1 decode or 2 verify.",
        "",
        "## Records inside the device",
        "",
        "They have the same form, but no message carries them: they are the payloads of the",
        "streams between the stages, and what a bench compares with the golden model.",
    ]
    for record in RECORDS.values():
        if record not in on_wire:
            lines += ["", f"### {record.name}", "", record.description, ""]
            lines += _table(head[1:], [row[1:] for row in _field_rows(record)])
    lines += [
        "",
        "`source` of a Candidate is 0 predictor or 1 hint. `op` of a BufferRequest is "
        + ", ".join(f"{int(op)} {op.name}" for op in records.BufferOp)
        + "; `code` of a",
        "BufferResult is "
        + ", ".join(f"{int(code)} {code.name}" for code in records.BufferCode)
        + ". `kind` of a ValueBeat is "
        + ", ".join(f"{int(kind)} {kind.name}" for kind in records.ValueKind)
        + ".",
        "",
    ]
    return "\n".join(lines)


#: Path in the source tree and text of each generated file.
_FILES: dict[str, Callable[[], str]] = {
    "sw/include/prestage.h": c_header,
    "docs/registers.md": registers_page,
    "docs/messages.md": messages_page,
}


def generated_files() -> dict[Path, str]:
    """Text of every generated file by its path in the source tree."""
    root = Path(__file__).resolve().parents[3]
    return {root / name: text() for name, text in _FILES.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the generated files, or compare them."""
    parser = argparse.ArgumentParser(
        prog="python -m prestage_hw.contract.generate",
        description="Write the files that are derived from the contract.",
    )
    parser.add_argument("--check", action="store_true", help="only compare; fail if one is stale")
    options = parser.parse_args(arguments)
    stale = [
        (path, text)
        for path, text in generated_files().items()
        if not path.exists() or path.read_text() != text
    ]
    for path, text in stale:
        if options.check:
            print(f"{path} is stale: run python -m prestage_hw.contract.generate", file=sys.stderr)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            print(f"wrote {path}")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
