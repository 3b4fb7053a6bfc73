# amaranth: UnusedElaboratable=no
"""RTL layouts: field names, order and widths are those of the records."""

import re

import pytest
from amaranth.lib import data

from prestage_hw.contract import RECORDS, DeviceConfig, preset
from prestage_hw.layouts import RecordLayout

CONFIGS = [
    DeviceConfig(model=preset("tiny"), slots=4, contexts=2, data_bytes=4, address_bits=32),
    DeviceConfig(model=preset("qwen3-30b-a3b"), slots=1536),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model.name)
@pytest.mark.parametrize("name", RECORDS)
def test_layout_is_the_record(name, config):
    layout = RecordLayout(name, config=config)
    fields = RECORDS[name].fields
    assert [key for key, _ in layout] == [field.name for field in fields]
    at = 0
    for (_, placed), field in zip(layout, fields, strict=True):
        bits = field.bits(config) * field.length(config)
        assert (placed.offset, placed.width) == (at, bits)
        if field.count is not None:
            assert isinstance(placed.shape, data.ArrayLayout)
            assert placed.shape.length == field.length(config)
        at += bits
    assert layout.size == at


def test_unknown_record():
    text = f"Record must be one of {', '.join(RECORDS)}, not 'Weights'"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        RecordLayout("Weights", config=CONFIGS[0])


def test_configuration_must_be_one():
    with pytest.raises(TypeError, match=r"^Configuration must be a DeviceConfig, not 'tiny'$"):
        RecordLayout("Ready", config="tiny")
