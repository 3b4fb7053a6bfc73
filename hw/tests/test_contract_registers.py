"""The register list: addresses, counters, and the hash that guards them."""

import dataclasses
import re
import zlib

import numpy as np
import pytest

from prestage_hw.contract import (
    REGISTERS,
    DeviceConfig,
    preset,
    register_by_name,
    register_hash,
    registers,
)
from prestage_hw.contract.records import REFUSAL_TEXT, Refusal, SettingsRefusal


def test_addresses_and_names_are_unique_and_ascend():
    addresses = [register.address for register in REGISTERS]
    assert addresses == sorted(set(addresses))
    assert len({register.name for register in REGISTERS}) == len(REGISTERS)


def test_every_counter_has_its_registers():
    for counter in registers.COUNTERS:
        if counter.bits == 32:
            assert register_by_name(counter.name).access == "ro"
        else:
            low = register_by_name(f"{counter.name}_low")
            high = register_by_name(f"{counter.name}_high")
            assert high.address == low.address + 1


def test_reset_values_fit():
    for register in REGISTERS:
        assert register.access in ("ro", "rw", "wo")
        assert register.reset is None or 0 <= register.reset < 1 << 32
        assert register.description.endswith(".")


def test_unknown_register():
    known = ", ".join(register.name for register in REGISTERS)
    with pytest.raises(
        ValueError,
        match=f"^{re.escape(f'Register must be one of {known}, not {chr(39)}nix{chr(39)}')}$",
    ):
        register_by_name("nix")


def test_hash_is_the_documented_one():
    text = "\n".join(
        f"0x{r.address:04x} {r.name} {r.access} {'-' if r.reset is None else r.reset}"
        for r in REGISTERS
    )
    assert register_hash() == zlib.crc32(text.encode())


@pytest.mark.parametrize(
    "change", [{"name": "other"}, {"address": 0x7F}, {"access": "rw"}, {"reset": 5}]
)
def test_hash_changes_with_the_list(monkeypatch, change):
    before = register_hash()
    changed = (dataclasses.replace(REGISTERS[0], **change), *REGISTERS[1:])
    monkeypatch.setattr(registers, "REGISTERS", changed)
    assert register_hash() != before


def test_hash_ignores_descriptions(monkeypatch):
    before = register_hash()
    changed = (dataclasses.replace(REGISTERS[0], description="Other."), *REGISTERS[1:])
    monkeypatch.setattr(registers, "REGISTERS", changed)
    assert register_hash() == before


def test_shape_registers():
    config = DeviceConfig(model=preset("gpt-oss-20b"), slots=192, predictor="none")
    values = registers.shape_registers(config)
    assert values["device_id"].to_bytes(4, "big") == b"PRST"
    assert values["layers"] == 24
    assert values["experts"] == 32
    assert values["top_k"] == 4
    assert values["slots"] == 192
    assert values["predictor"] == 0
    assert values["register_hash"] == register_hash()
    assert values["layer_sizes"] == 0
    sizes = config.replace(layer_bytes=(2048, 512) * 12)
    tiles = np.array([4, 1] * 12, "<u4")
    assert registers.shape_registers(sizes)["layer_sizes"] == zlib.crc32(tiles.tobytes())
    rows = np.array([64, 128, 4096, 32 * 4096], "<u8")
    told = registers.shape_registers(config.replace(rows=((64, 128),)))
    assert told["layer_sizes"] == zlib.crc32(rows.tobytes())
    # Exactly the read-only registers whose reset value depends on the configuration, and two fixed.
    assert {*values} - {"device_id", "version"} == {
        r.name for r in REGISTERS if r.access == "ro" and r.reset is None
    } - {
        *("table_words", "cycles_low", "cycles_high", "throttle_state"),
        *("layer_time", "tile_time"),
    }


def test_refusals_begin_with_those_of_channel_settings():
    settings = {reason.name: int(reason) for reason in SettingsRefusal}
    assert settings.items() <= {reason.name: int(reason) for reason in Refusal}.items()
    assert len(REFUSAL_TEXT) == len(Refusal)
