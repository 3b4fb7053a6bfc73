# amaranth: UnusedElaboratable=no
"""Heads of the perceptron against their golden model; see ``cocotb_linear.py``."""

import os
from pathlib import Path

import pytest

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import HeadConfig, PerceptronConfig, perceptron_form
from prestage_hw.predictor.linear import LinearHead
from prestage_tb.bench import run_bench

_MODULE = Path(__file__).with_name("cocotb_linear.py")
_TRACES = Path(os.environ.get("PRESTAGE_TRACES", "/work/shared/traces"))
_ALL = (
    "follows_golden",
    "keeps_loaded_tables",
    "clears_in_mid_run",
    "restarts_in_mid_flight",
    "is_as_fast_as_promised",
    "sustains_its_rate",
    "predicts_while_it_learns",
)


def _device(model, form, *, contexts=1, **changes):
    """Device with a perceptron of any shape."""
    return DeviceConfig(
        model=model,
        slots=contexts * model.top_k,
        expert_bytes=512,
        contexts=contexts,
        predictor="perceptron",
        perceptron=perceptron_form(form).replace(**changes),
    )


def _model(layers, experts, top_k):
    return ModelConfig(name="model", layers=layers, experts=experts, top_k=top_k)


def _heads(*heads):
    """A perceptron's heads: P1 and P0 must be among them."""
    given = {head.name: head for head in heads}
    least = {name: HeadConfig(name=name) for name in ("P1", "P0")}
    return tuple((least | given)[name] for name in HeadConfig.NAMES if name in least | given)


_CROSSES = ("AC", "AA", "AB")
_SHAPES = {
    "tiny": _device(PRESETS["tiny"], "lite", contexts=2),
    "gpt-oss-20b": _device(PRESETS["gpt-oss-20b"], "lite"),
    # Lists in one word and in two, of an expert count that is a power of two and of one that isn't.
    "lists": _device(_model(3, 128, 8), "compressed", contexts=2),
    "lists of two words": _device(_model(2, 61, 3), "compressed", lanes=4),
    # All lanes side by side, conjunctions that meet in few rows.
    "full": _device(_model(4, 32, 4), "full", cross_rows=4),
    "full of 16": _device(_model(4, 16, 3), "full", contexts=2, banked=True),
    # Rows of three words, the last one not full; products in addresses.
    "odd": _device(_model(4, 20, 2), "full", lanes=8, cross_rows=16),
    "one of nine": _device(_model(4, 9, 1), "full", lanes=4),
    # Two groups of lanes that share parity.
    "banked": _device(
        _model(3, 24, 4), "lite", contexts=3, banked=True, lanes=16
    ),
}
_CASES = [
    *((shape, name) for shape in ("tiny", "gpt-oss-20b", "full of 16") for name in ("P0", "R")),
    *((shape, "P1") for shape in _SHAPES),
    ("full of 16", "P2"),
    ("lists of two words", "P0"),
    ("odd", "R"),
    ("banked", "R"),
]


def _run(config, number, *, tests, public=False, **parameters):
    head = config.perceptron.heads[number]
    run_bench(
        lambda: LinearHead(config, head=head, number=number),
        module=_MODULE,
        name="linear",
        parameters={"config": config, "number": number, **parameters},
        testcase=list(tests),
        public=public,
    )


@pytest.mark.parametrize(("shape", "name"), _CASES, ids=[" ".join(case) for case in _CASES])
def test_shape(shape, name):
    """Heads of many shapes."""
    config = _SHAPES[shape]
    names = [head.name for head in config.perceptron.heads]
    _run(config, names.index(name), tests=_ALL, jobs=150)
