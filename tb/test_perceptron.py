# amaranth: UnusedElaboratable=no
"""The whole ``perceptron`` predictor; the simulation half is ``cocotb_perceptron.py``."""

from pathlib import Path

import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import HeadConfig, perceptron_form
from prestage_hw.predictor import PerceptronPredictor
from prestage_tb.bench import run_bench

_MODULE = Path(__file__).with_name("cocotb_perceptron.py")


def _device(form, *, layers=5, experts=16, top_k=3, contexts=1, **changes):
    """A device with a small model and a form of the predictor."""
    tables = {"token_rows": 16, "pair_rows": 16, "token_store": "block"}
    return DeviceConfig(
        model=ModelConfig(name="small", layers=layers, experts=experts, top_k=top_k),
        slots=contexts * top_k,
        expert_bytes=512,
        contexts=contexts,
        predictor="perceptron",
        perceptron=perceptron_form(form).replace(**{**tables, **changes}),
    )


_SHAPES = {
    "lite": _device("lite"),
    "lite, three contexts": _device("lite", contexts=3, experts=20, top_k=2, lanes=4),
    "compressed": _device("compressed", experts=32, top_k=4, contexts=2),
    "full": _device("full", cross_rows=16),
    "full, banked": _device("full", cross_rows=8, contexts=2, layers=4, banked=True),
    # Predictions of token start take longer than those of the layer before, which overtake them.
    "slow start": _device(
        "lite",
        layers=4,
        heads=(
            HeadConfig(name="P1", diagonals=("B",)),
            HeadConfig(name="P0", rows=("B", "T", "Q"), diagonals=("G",)),
            HeadConfig(name="R", diagonals=("B",)),
        ),
        lanes=2,
    ),
    "without hints": _device("lite", hints=False),
}


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param("lite", marks=pytest.mark.soak),
        "lite, three contexts",
        "compressed",
        pytest.param("full", marks=pytest.mark.soak),
        pytest.param("full, banked", marks=pytest.mark.soak),
        "slow start",
    ],
)
def test_structure(shape):
    run_bench(
        PerceptronPredictor(_SHAPES[shape]),
        module=_MODULE,
        name="perceptron",
        parameters={
            "config": _SHAPES[shape],
            "tokens": 7,
            "compare": True,
            "ahead": 0 if shape == "slow start" else 3,
        },
        testcase=["follows_golden_on_structure"],
    )


@pytest.mark.parametrize("form", ["lite", pytest.param("full", marks=pytest.mark.soak)])
def test_flipped_bits(form):
    run_bench(
        PerceptronPredictor(_SHAPES[form]),
        module=_MODULE,
        name="perceptron",
        parameters={"config": _SHAPES[form], "tokens": 10, "memories": 8},
        testcase=["survives_flipped_bits"],
        public=True,
    )


@pytest.mark.parametrize(
    "form",
    ["compressed", pytest.param("full", marks=pytest.mark.soak)],
)
def test_speed(form):
    """The bounds for 128 experts and k = 8; few layers, as cycles do not depend on them."""
    config = _device(form, layers=6, experts=128, top_k=8)
    run_bench(
        PerceptronPredictor(config),
        module=_MODULE,
        name="perceptron",
        parameters={"config": config, "tokens": 6},
        testcase=["is_as_fast_as_promised"],
    )


def test_rejects_other_predictors():
    with pytest.raises(ValueError, match="Predictor must be perceptron, not 'none'"):
        PerceptronPredictor(_SHAPES["lite"].replace(predictor="none"))
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not None"):
        PerceptronPredictor(None)
