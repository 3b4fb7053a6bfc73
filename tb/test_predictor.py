# amaranth: UnusedElaboratable=no
"""Predictors against their golden models; the simulation half is ``cocotb_predictor.py``."""

import os
from pathlib import Path

import pytest

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig
from prestage_hw.contract.params import TINY_DEVICE
from prestage_hw.predictor import PREDICTORS, StMoePredictor, create_predictor
from prestage_tb.bench import run_bench

_MODULE = Path(__file__).with_name("cocotb_predictor.py")
_TRACES = Path(os.environ.get("PRESTAGE_TRACES", "/work/shared/traces"))
_RANDOM = (
    "follows_golden",
    "keeps_loaded_tables",
    "clears_in_mid_run",
    "restarts_in_mid_flight",
    "takes_token_starts_first",
    "is_busy_while_an_output_waits",
    "is_as_fast_as_promised",
)


def _device(name, **shape):
    """Device with a model of any shape."""
    keywords = {key: shape.pop(key) for key in ("successors", "contexts") if key in shape}
    model = PRESETS[name] if name in PRESETS else ModelConfig(name=name, **shape)
    slots = keywords.get("contexts", 1) * model.top_k
    return DeviceConfig(model=model, slots=slots, expert_bytes=512, **keywords)


_SHAPES = {
    "tiny": TINY_DEVICE,
    # Nothing is a power of two, and words of padding lie everywhere.
    "odd": _device("odd", layers=3, experts=60, top_k=3, successors=5, contexts=3),
    # One successor, one expert a choice: counters without bits.
    "single": _device("single", layers=2, experts=9, top_k=1, successors=1),
    # No pair of layers: nothing to predict or learn.
    "flat": _device("flat", layers=1, experts=4, top_k=2, contexts=2),
    # All experts chosen, more chosen than successors kept.
    "dense": _device("dense", layers=5, experts=4, top_k=4, successors=2, contexts=2),
}


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_tiny(predictor):
    """Every registered predictor."""
    config = TINY_DEVICE.replace(predictor=predictor)
    run_bench(
        create_predictor(config),
        module=_MODULE,
        name="predictor",
        parameters={"config": config, "decisions": 900},
        testcase=list(_RANDOM),
    )


@pytest.mark.parametrize("shape", ["odd", "single", "flat", "dense"])
def test_shape(shape):
    """Shapes at the edges."""
    config = _SHAPES[shape]
    # The costliest decision learns and predicts at once: that takes three layers.
    timed = config.model.layers >= 3
    tests = [name for name in _RANDOM if timed or name != "is_as_fast_as_promised"]
    run_bench(
        create_predictor(config),
        module=_MODULE,
        name="predictor",
        parameters={"config": config, "decisions": 300},
        testcase=tests,
    )


def test_speed_of_large_model():
    """The stated bounds hold for a large model too."""
    config = _device("qwen3-30b-a3b")
    run_bench(
        create_predictor(config),
        module=_MODULE,
        name="predictor",
        parameters={"config": config},
        testcase=["is_as_fast_as_promised"],
    )


def test_preset():
    """The gpt-oss-20b preset on random routing."""
    config = _device("gpt-oss-20b")
    run_bench(
        create_predictor(config),
        module=_MODULE,
        name="predictor",
        parameters={"config": config, "decisions": 90},
        testcase=["follows_golden", "is_as_fast_as_promised"],
    )


@pytest.mark.extra
def test_trace():
    """The gpt-oss-20b preset on a real trace."""
    path = _TRACES / "gpt-oss-20b__cs.npz"
    config = _device("gpt-oss-20b")
    if not path.exists():
        pytest.skip(f"trace {path} is not here")
    run_bench(
        create_predictor(config),
        module=_MODULE,
        name="predictor",
        parameters={"config": config, "trace": str(path), "tokens": 60},
        testcase=["follows_golden_on_trace"],
    )


def test_rejects_what_is_no_configuration():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        create_predictor(3)
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not None"):
        StMoePredictor(None)


def test_registry_is_that_of_the_contract():
    assert tuple(PREDICTORS) == DeviceConfig.PREDICTORS
