# amaranth: UnusedElaboratable=no
"""Token tables of the perceptron predictor; the simulation half is ``cocotb_tokens.py``."""

from pathlib import Path

import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.perceptron import HeadConfig, PerceptronConfig
from prestage_hw.predictor.tokens import TokenTable, table_rows
from prestage_hw.predictor.tokens_memory import TokenMemory, token_regions
from prestage_tb.bench import run_bench

_MODULE = Path(__file__).with_name("cocotb_tokens.py")
_TESTS = [
    "follows_golden",
    "clears_in_mid_run",
    "restarts_in_mid_flight",
    "is_as_fast_as_promised",
    "forgets_words_of_bad_parity",
]
_BLOCK_TESTS = [*_TESTS, "keeps_loaded_words"]
_MEMORY_TESTS = [*_TESTS, "takes_errors_for_misses"]


def _device(*, layers, experts, top_k, features=("T", "T2", "Q", "S"), **keywords):
    """Device with a model of any shape."""
    model = ModelConfig(name="any", layers=layers, experts=experts, top_k=top_k)
    perceptron = PerceptronConfig(
        heads=(HeadConfig(name="P1"), HeadConfig(name="P0", diagonals=features)),
        lanes=2,
        token_rows=8,
        pair_rows=16,
        token_store="memory",
    )
    return DeviceConfig(
        model=model,
        slots=top_k,
        expert_bytes=512,
        predictor="perceptron",
        perceptron=perceptron,
        **keywords,
    )


_SHAPES = {
    # A choice of few bits; a row word is one table word.
    "small": _device(layers=4, experts=8, top_k=2),
    # Three table words to a row word of two choices.
    "odd": _device(layers=3, experts=60, top_k=6),
    "single": _device(layers=2, experts=9, top_k=1),
}


@pytest.mark.parametrize("choices", [1, 2])
@pytest.mark.parametrize("shape", _SHAPES)
def test_block(shape, choices):
    """A table in block RAM."""
    config = _SHAPES[shape]
    run_bench(
        TokenTable(config, rows=8, choices=choices),
        module=_MODULE,
        name="tokens",
        parameters={"config": config, "rows": 8, "choices": choices, "memory": False},
        testcase=_BLOCK_TESTS,
        public=True,
    )


def test_banks():
    """So many rows that their words lie in two banks, the layers of an entry in both."""
    config = _SHAPES["odd"]
    run_bench(
        TokenTable(config, rows=1024, choices=2),
        module=_MODULE,
        name="tokens",
        parameters={"config": config, "rows": 1024, "choices": 2, "memory": False},
        testcase=["follows_golden", "keeps_loaded_words", "is_as_fast_as_promised"],
    )


_MEMORY_SHAPES = {
    # A header of two beats, words of three, many bursts.
    "narrow": _device(layers=5, experts=60, top_k=6, data_bytes=4, burst_beats=4),
    # A word is far less than a beat.
    "wide": _device(layers=4, experts=8, top_k=2, data_bytes=64),
    # One table only, a beat a burst.
    "one": _device(layers=2, experts=9, top_k=1, features=("Q",), data_bytes=8, burst_beats=1),
    # Entries longer than 4 KiB.
    "long": _device(
        layers=70, experts=1024, top_k=16, features=("T",), data_bytes=64, burst_beats=256
    ),
}


@pytest.mark.parametrize("shape", _MEMORY_SHAPES)
def test_memory(shape):
    """All tables behind the memory port."""
    config = _MEMORY_SHAPES[shape]
    run_bench(
        TokenMemory(config),
        module=_MODULE,
        name="tokens",
        parameters={"config": config, "memory": True},
        testcase=_MEMORY_TESTS,
    )


def test_regions_follow_each_other():
    config = _MEMORY_SHAPES["narrow"]
    regions = token_regions(config)
    assert tuple(regions) == ("token", "pair", "successor")
    assert [region.beats for region in regions.values()] == [2 + 5 * 3, 2 + 5 * 2, 2 + 5 * 2]
    assert [region.stride for region in regions.values()] == [128, 64, 64]
    assert [region.offset for region in regions.values()] == [0, 8 * 128, 8 * 128 + 16 * 64]
    assert TokenMemory(config).memory_bytes == 8 * 128 + 16 * 64 + 8 * 64
    assert token_regions(_MEMORY_SHAPES["long"])["token"].stride == 8192
    assert table_rows(_MEMORY_SHAPES["one"]) == {"pair": 16}


def test_rejects_bad_parameters():
    config = _SHAPES["small"]
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not None"):
        TokenTable(None, rows=8, choices=1)
    with pytest.raises(ValueError, match="Row count must be a power of two, not 9"):
        TokenTable(config, rows=9, choices=1)
    with pytest.raises(ValueError, match="Row count must be between 4 and 1048576, not 2"):
        TokenTable(config, rows=2, choices=1)
    with pytest.raises(ValueError, match="Choice count must be between 1 and 2, not 3"):
        TokenTable(config, rows=8, choices=3)
    with pytest.raises(TypeError, match="Choice count must be an integer, not '1'"):
        TokenTable(config, rows=8, choices="1")
    with pytest.raises(ValueError, match="Heads must need a token table, but there is none"):
        TokenMemory(_device(layers=2, experts=8, top_k=1, features=()))
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        TokenMemory(3)
    assert TINY_DEVICE.replace(predictor="perceptron").perceptron is not None
