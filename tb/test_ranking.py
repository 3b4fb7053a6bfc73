# amaranth: UnusedElaboratable=no
"""Ranking of candidates against its golden model; the simulation half is ``cocotb_ranking.py``."""

from pathlib import Path

import pytest

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import perceptron_form
from prestage_hw.predictor.ranking import PatchLayout, Ranking, ValuesLayout
from prestage_tb.bench import run_bench

_MODULE = Path(__file__).with_name("cocotb_ranking.py")


def _device(model, *, lanes=8, contexts=1):
    return DeviceConfig(
        model=model,
        slots=contexts * model.top_k,
        expert_bytes=512,
        contexts=contexts,
        predictor="perceptron",
        perceptron=perceptron_form("lite").replace(lanes=lanes),
    )


def _model(experts, top_k):
    return ModelConfig(name="test", layers=5, experts=experts, top_k=top_k)


_SHAPES = {
    "tiny": (_device(PRESETS["tiny"], contexts=2), 300),
    "gpt-oss-20b": (_device(PRESETS["gpt-oss-20b"]), 120),
    "qwen3-30b-a3b": (_device(PRESETS["qwen3-30b-a3b"]), 80),
    # All experts side by side.
    "wide": (_device(PRESETS["qwen3-30b-a3b"], lanes=1024), 80),
    # No power of two, a group in several beats.
    "ten": (_device(_model(10, 3), contexts=3), 200),
    "narrow": (_device(_model(42, 2), lanes=2), 100),
    "two": (_device(_model(2, 1)), 100),
    # So many groups that comparing them takes longer.
    "large": (_device(_model(300, 16), lanes=16), 40),
}


#: Shapes whose builds take long; the others show the same.
_SOAK = ("wide", "large")


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=pytest.mark.soak if s in _SOAK else ()) for s in _SHAPES],
)
def test_ranking(shape):
    config, layers = _SHAPES[shape]
    run_bench(
        Ranking(config),
        module=_MODULE,
        name="ranking",
        parameters={"config": config, "layers": layers},
    )


@pytest.mark.parametrize(
    "make", [Ranking, lambda x: ValuesLayout(config=x), lambda x: PatchLayout(config=x)]
)
def test_rejects_what_is_no_configuration(make):
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        make(3)


@pytest.mark.parametrize(
    ("experts", "first", "following"),
    [(8, 5, 4), (32, 5, 4), (33, 7, 4), (128, 7, 4), (129, 9, 6), (512, 9, 6), (1024, 11, 8)],
)
def test_states_its_latency(experts, first, following):
    block = Ranking(_device(_model(experts, 1)))
    assert (block.first_candidate_cycles, block.next_candidate_cycles) == (first, following)
    if experts <= 128:
        # Side by side no group waits for another; to compare more than four takes a cycle more.
        wide = Ranking(_device(_model(experts, 1), lanes=128))
        first = 5 + int(experts > 32)
        assert (wide.first_candidate_cycles, wide.next_candidate_cycles) == (first, 4)
