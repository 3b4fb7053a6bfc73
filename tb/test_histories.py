# amaranth: UnusedElaboratable=no
"""Histories of the perceptron predictor; the simulation half is ``cocotb_histories.py``."""

import os
from pathlib import Path

import pytest

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.contract.perceptron import HeadConfig, PerceptronConfig, perceptron_form
from prestage_hw.predictor.histories import Histories
from prestage_tb.bench import run_bench

_MODULE = Path(__file__).with_name("cocotb_histories.py")
_TRACES = Path(os.environ.get("PRESTAGE_TRACES", "/work/shared/traces"))
_RANDOM = [
    "follows_golden",
    "keeps_loaded_tables",
    "clears_in_mid_run",
    "restarts_in_mid_flight",
    "is_as_fast_as_promised",
    "forgets_words_of_bad_parity",
]


def _device(model, perceptron, *, contexts=1, **keywords):
    return DeviceConfig(
        model=model,
        slots=contexts * model.top_k,
        expert_bytes=512,
        contexts=contexts,
        predictor="perceptron",
        perceptron=perceptron,
        **keywords,
    )


_EVERYTHING = PerceptronConfig(
    heads=(
        HeadConfig(name="P1", rows=("A", "C", "D"), crosses=("AB",), diagonals=("Bn", "Bp")),
        HeadConfig(name="P2", rows=("A",), diagonals=("G", "T", "Q")),
        HeadConfig(name="P3", crosses=("AC",)),
        HeadConfig(name="P0", rows=("B",), diagonals=("S", "T2")),
        HeadConfig(name="R", rows=("B", "S"), diagonals=("Bn", "Bp", "G")),
    ),
    lanes=4,
    token_rows=16,
    pair_rows=8,
)

_SHAPES = {
    "tiny": TINY_DEVICE.replace(
        predictor="perceptron", perceptron=perceptron_form("lite").replace(token_rows=16)
    ),
    # Every set, three of one memory at once, a number of contexts, layers and experts that is no
    # power of two, row words of three table words.
    "everything": _device(
        ModelConfig(name="everything", layers=5, experts=60, top_k=6), _EVERYTHING, contexts=3
    ),
    # One expert a choice, this token's history only, no table.
    "single": _device(
        ModelConfig(name="single", layers=2, experts=9, top_k=1),
        PerceptronConfig(
            heads=(HeadConfig(name="P1", rows=("A",)), HeadConfig(name="P0")), lanes=2
        ),
    ),
    # Tables behind the memory port: a header of two beats, words of three, several bursts.
    "memory": _device(
        ModelConfig(name="memory", layers=5, experts=60, top_k=6),
        _EVERYTHING.replace(token_store="memory"),
        contexts=3,
        data_bytes=4,
        burst_beats=4,
    ),
    # What only one of the memories is needed for.
    "sparse": _device(
        ModelConfig(name="sparse", layers=3, experts=8, top_k=2),
        PerceptronConfig(
            heads=(
                HeadConfig(name="P1", rows=("S",)),
                HeadConfig(name="P0", diagonals=("G",)),
                HeadConfig(name="R"),
            ),
            lanes=2,
            token_rows=4,
        ),
        contexts=2,
    ),
}


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=pytest.mark.soak if s == "everything" else ()) for s in _SHAPES],
)
def test_shape(shape):
    """Random routing, table traffic, faults."""
    config = _SHAPES[shape]
    run_bench(
        Histories(config),
        module=_MODULE,
        name="histories",
        parameters={"config": config, "tokens": 240},
        testcase=_RANDOM,
        public=True,
    )


@pytest.mark.extra
def test_trace():
    """The gpt-oss-20b preset on a real trace, with all of its table's rows."""
    path = _TRACES / "gpt-oss-20b__cs.npz"
    if not path.exists():
        pytest.skip(f"trace {path} is not here")
    config = _device(PRESETS["gpt-oss-20b"], perceptron_form("lite"))
    run_bench(
        Histories(config),
        module=_MODULE,
        name="histories",
        parameters={"config": config, "trace": str(path), "tokens": 120},
        testcase=["follows_golden_on_trace", "is_as_fast_as_promised"],
    )


def test_large_model():
    """The compressed form of qwen3-30b-a3b."""
    perceptron = perceptron_form("compressed").replace(token_rows=64, pair_rows=64)
    config = _device(PRESETS["qwen3-30b-a3b"], perceptron, contexts=2)
    run_bench(
        Histories(config),
        module=_MODULE,
        name="histories",
        parameters={"config": config, "tokens": 40},
        testcase=["follows_golden", "is_as_fast_as_promised"],
    )


def test_rejects_what_is_no_perceptron():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        Histories(3)
    with pytest.raises(ValueError, match="Predictor must be 'perceptron', not 'none'"):
        Histories(TINY_DEVICE.replace(predictor="none"))


def test_tells_words_of_tables():
    histories = Histories(_SHAPES["everything"])
    assert [histories.table_words(n) for n in range(4)] == [16 * 16, 8 * 11, 16 * 11, 0]
