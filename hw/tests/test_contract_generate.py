"""Generated files: none is stale, and the C header agrees with the NumPy dtypes."""

import re
import subprocess

import pytest

from prestage_hw.contract import MESSAGES, RECORDS, REGISTERS, DeviceConfig, generate, preset
from prestage_hw.contract.records import ErrorCode
from prestage_hw.contract.registers import register_hash

CONFIG = DeviceConfig(model=preset("gpt-oss-20b"), slots=192)


@pytest.mark.parametrize("path", generate.generated_files(), ids=lambda path: path.name)
def test_generated_file_is_fresh(path):
    assert path.read_text() == generate.generated_files()[path], (
        f"{path} is stale: run python -m prestage_hw.contract.generate"
    )


def test_check_finds_stale_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        generate, "generated_files", lambda: {tmp_path / "docs" / "page.md": "text\n"}
    )
    assert generate.main(["--check"]) == 1
    assert "is stale" in capsys.readouterr().err
    assert generate.main([]) == 0
    assert (tmp_path / "docs" / "page.md").read_text() == "text\n"
    assert generate.main(["--check"]) == 0
    assert generate.main([]) == 0
    (tmp_path / "docs" / "page.md").write_text("other\n")
    assert generate.main(["--check"]) == 1


def test_pages_name_everything():
    registers, messages = generate.registers_page(), generate.messages_page()
    assert all(f"`{register.name}`" in registers for register in REGISTERS)
    assert all(f"`{message.name}`" in messages for message in MESSAGES.values())
    assert all(f"### {record}\n" in messages for record in RECORDS)


@pytest.fixture(scope="module", params=["c", "c++"])
def printed(request, tmp_path_factory):
    """What a program that includes the header prints, as numbers by name."""
    folder = tmp_path_factory.mktemp("header")
    header = generate.c_header()
    (folder / "prestage.h").write_text(header)
    lines = []
    for struct, body in re.findall(r"struct (\w+) \{\n(.*?)\};", header, re.DOTALL):
        lines.append(f'P("{struct}", sizeof(struct {struct}))')
        for field in re.findall(r"uint\d+_t (\w+)(?:\[\d+\])?;", body):
            lines.append(f'P("{struct}.{field}", offsetof(struct {struct}, {field}))')
    for name in re.findall(r"^    (PRESTAGE_\w+) = ", header, re.MULTILINE):
        lines.append(f'P("{name}", {name})')
    lines.append('P("PRESTAGE_REGISTER_HASH", PRESTAGE_REGISTER_HASH)')
    suffix = {"c": "c", "c++": "cpp"}[request.param]
    source = folder / f"main.{suffix}"
    source.write_text(
        '#include <stddef.h>\n#include <stdio.h>\n#include "prestage.h"\n'
        '#define P(name, value) printf("%s %lu\\n", name, (unsigned long)(value));\n'
        "int main(void)\n{\n" + "\n".join(lines) + "\nreturn 0;\n}\n"
    )
    compiler = {"c": ["gcc", "-std=c11"], "c++": ["g++", "-std=c++14"]}[request.param]
    flags = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
    subprocess.run([*compiler, *flags, source.name, "-o", "main"], cwd=folder, check=True)
    text = subprocess.run([folder / "main"], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in (line.split() for line in text.splitlines())}


def snake(name):
    return re.sub(r"(?<!^)([A-Z])", r"_\1", name).lower()


def test_structs_have_the_layout_of_the_dtypes(printed):
    compared = 0
    for message in MESSAGES.values():
        if message.record is None:
            continue
        struct = f"prestage_{snake(message.record.name)}"
        dtype = message.record.dtype(CONFIG)
        whole = struct in printed
        assert whole == all(not isinstance(f.count, str) for f in message.record.fields)
        if whole:
            assert printed[struct] == dtype.itemsize
        for field in message.record.fields:
            if not whole and isinstance(field.count, str):
                assert printed[f"{struct}_head"] == dtype.fields[field.name][1]
                break
            name = f"{struct if whole else struct + '_head'}.{field.name}"
            # "register" is a keyword of C.
            offset = printed.get(name, printed.get(f"{name}_"))
            assert offset == dtype.fields[field.name][1]
            compared += 1
    assert compared > 20


def test_codes_and_addresses(printed):
    for message in MESSAGES.values():
        assert printed[f"PRESTAGE_{message.name}"] == message.code
    for register in REGISTERS:
        assert printed[f"PRESTAGE_REG_{register.name.upper()}"] == register.address
    for code in ErrorCode:
        assert printed[f"PRESTAGE_ERROR_CODE_{code.name}"] == code
    assert printed["PRESTAGE_REGISTER_HASH"] == register_hash()
