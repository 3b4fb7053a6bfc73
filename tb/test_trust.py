# amaranth: UnusedElaboratable=no
"""Trust in hints against its golden model; the simulation half is ``cocotb_trust.py``."""

from pathlib import Path

import pytest

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import perceptron_form
from prestage_hw.predictor.trust import HintedLayout, OpinionLayout, Trust, TrustValuesLayout
from prestage_tb.bench import run_bench

_MODULE = Path(__file__).with_name("cocotb_trust.py")
_RANDOM = (
    "follows_golden",
    "restarts_in_mid_flight",
    "clears_everything",
    "takes_jobs_in_order",
    "is_idle_only_when_done",
)


def _device(model, *, lanes=8, contexts=2, hints=True):
    return DeviceConfig(
        model=model,
        slots=contexts * model.top_k,
        expert_bytes=512,
        contexts=contexts,
        predictor="perceptron",
        perceptron=perceptron_form("lite").replace(lanes=lanes, hints=hints),
    )


def _model(experts, top_k, *, layers=6):
    return ModelConfig(name="test", layers=layers, experts=experts, top_k=top_k)


_SHAPES = {
    "tiny": (_device(PRESETS["tiny"]), 150),
    "gpt-oss-20b": (_device(PRESETS["gpt-oss-20b"], contexts=1), 120),
    "qwen3-30b-a3b": (_device(PRESETS["qwen3-30b-a3b"]), 60),
    # All experts side by side.
    "wide": (_device(PRESETS["qwen3-30b-a3b"], lanes=1024), 60),
    # No power of two.
    "ten": (_device(_model(10, 3), contexts=3), 150),
    "narrow": (_device(_model(21, 2, layers=2), lanes=2), 150),
}


#: What the other shapes show, too.
_SOAK = ("qwen3-30b-a3b", "narrow")


@pytest.mark.parametrize(
    "shape",
    [pytest.param(s, marks=pytest.mark.soak if s in _SOAK else ()) for s in _SHAPES],
)
def test_trust(shape):
    config, steps = _SHAPES[shape]
    timed = ["is_as_fast_as_promised"] if config.contexts > 1 else []
    run_bench(
        Trust(config),
        module=_MODULE,
        name="trust",
        parameters={"config": config, "steps": steps},
        testcase=[*_RANDOM, *timed],
    )


@pytest.mark.parametrize("shape", ["tiny", pytest.param("ten", marks=pytest.mark.soak), "wide"])
def test_bit_flips(shape):
    config, steps = _SHAPES[shape]
    run_bench(
        Trust(config),
        module=_MODULE,
        name="trust",
        parameters={"config": config, "steps": steps},
        testcase="survives_bit_flips",
        public=True,
    )


def test_without_hints():
    """Hints are dropped, everything else goes on."""
    config = _device(PRESETS["tiny"], hints=False)
    run_bench(
        Trust(config),
        module=_MODULE,
        name="trust",
        parameters={"config": config, "steps": 40},
        testcase=["follows_golden", "restarts_in_mid_flight", "is_idle_only_when_done"],
    )


@pytest.mark.parametrize("layout", [HintedLayout, OpinionLayout, TrustValuesLayout])
def test_rejects_what_is_no_configuration(layout):
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        layout(config=3)
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not None"):
        Trust(None)


def test_rejects_a_device_without_perceptron():
    config = DeviceConfig(model=PRESETS["tiny"], slots=8, predictor="st_moe")
    with pytest.raises(ValueError, match="must have a perceptron predictor"):
        Trust(config)
