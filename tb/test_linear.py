# amaranth: UnusedElaboratable=no
"""Heads of the perceptron against their golden model; see ``cocotb_linear.py``."""

import dataclasses
import os
from pathlib import Path

import pytest

from prestage_hw.contract import PRESETS, DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import HeadConfig, perceptron_form
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


# Rows, conjunctions and diagonal features in all heads, whatever the named forms take.
_HEADS = (
    HeadConfig(
        name="P1",
        rows=("A", "C", "D"),
        crosses=("AC", "AA", "AB"),
        diagonals=("B", "G", "T", "T2", "Q"),
    ),
    HeadConfig(name="P2", rows=("A",), crosses=("AB",), diagonals=("B", "Bn")),
    HeadConfig(name="P0", rows=("B", "T"), diagonals=("G", "T2", "Q", "S", "Bn", "Bp")),
    HeadConfig(name="R", rows=("B",), diagonals=("Bp", "G", "S")),
)
_LISTS = (
    HeadConfig(name="P1", rows=("A", "C", "D"), diagonals=("B", "G", "T", "T2", "Q")),
    HeadConfig(name="P0", rows=("B",), diagonals=("B", "G")),
    HeadConfig(name="R", rows=("B",), diagonals=("B", "G", "S")),
)
_SHAPES = {
    "tiny": _device(PRESETS["tiny"], "lite", contexts=2),
    "gpt-oss-20b": _device(PRESETS["gpt-oss-20b"], "lite"),
    # Lists in one word and in two, of an expert count that is a power of two and of one that isn't.
    "lists": _device(_model(3, 128, 8), "compressed", contexts=2, heads=_LISTS),
    "lists of two words": _device(_model(2, 61, 3), "compressed", lanes=4, heads=_LISTS),
    # All lanes side by side, conjunctions that meet in few rows.
    "full": _device(_model(4, 32, 4), "full", cross_rows=4, heads=_HEADS),
    "full of 16": _device(_model(4, 16, 3), "full", contexts=2, banked=True, heads=_HEADS),
    # Rows of three words, the last one not full; products in addresses.
    "odd": _device(_model(4, 20, 2), "full", lanes=8, cross_rows=16, heads=_HEADS),
    "one of nine": _device(_model(4, 9, 1), "full", lanes=4, heads=_HEADS),
    # Two groups of lanes that share parity.
    "banked": _device(_model(3, 24, 4), "lite", contexts=3, banked=True, lanes=16),
}
_CASES = [
    ("tiny", "P0"),
    ("tiny", "R"),
    ("gpt-oss-20b", "P1"),
    ("lists", "P1"),
    ("lists of two words", "P1"),
    ("lists of two words", "R"),
    ("odd", "P1"),
    ("one of nine", "P1"),
    ("banked", "P0"),
]
_SOAK = [
    ("tiny", "P1"),
    ("gpt-oss-20b", "P0"),
    ("gpt-oss-20b", "R"),
    ("lists of two words", "P0"),
    ("full", "P1"),
    ("full of 16", "P0"),
    ("full of 16", "P1"),
    ("full of 16", "P2"),
    ("full of 16", "R"),
    ("odd", "R"),
    ("banked", "P1"),
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


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        *(pytest.param(*case, id=" ".join(case)) for case in _CASES),
        *(pytest.param(*case, id=" ".join(case), marks=pytest.mark.soak) for case in _SOAK),
    ],
)
def test_shape(shape, name):
    """Heads of many shapes."""
    config = _SHAPES[shape]
    names = [head.name for head in config.perceptron.heads]
    _run(config, names.index(name), tests=_ALL, jobs=100)


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("banked", "R"),
        ("lists of two words", "P1"),
        pytest.param("gpt-oss-20b", "P1", marks=pytest.mark.soak),
        pytest.param("full of 16", "P1", marks=pytest.mark.soak),
    ],
)
def test_flipped_bits(shape, name):
    """Faults in every memory."""
    config = _SHAPES[shape]
    names = [head.name for head in config.perceptron.heads]
    _run(config, names.index(name), tests=["survives_flipped_bits"], public=True)


@pytest.mark.extra
@pytest.mark.parametrize(
    ("model", "form", "top_k", "tokens"),
    # The trace of the larger model holds six of its eight experts.
    [("gpt-oss-20b", "lite", 4, 8), ("qwen3-30b-a3b", "compressed", 6, 4)],
)
def test_trace(model, form, top_k, tokens):
    """Real routing."""
    path = next(_TRACES.glob(f"{model}__*.npz"), None)
    if path is None:
        pytest.skip(f"no trace of {model} is here")
    config = _device(dataclasses.replace(PRESETS[model], top_k=top_k), form)
    tests = ["follows_golden_on_trace"]
    _run(config, 0, tests=tests, trace=str(path), tokens=tokens)


def test_refuses_what_is_no_head():
    config = _SHAPES["tiny"]
    head = config.perceptron.heads[0]
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig, not 3"):
        LinearHead(3, head=head, number=0)
    with pytest.raises(TypeError, match="Head must be a HeadConfig, not 'P1'"):
        LinearHead(config, head="P1", number=0)
    with pytest.raises(ValueError, match="Head must be one of the perceptron's, not HeadConfig"):
        LinearHead(config, head=HeadConfig(name="P2"), number=0)
    with pytest.raises(TypeError, match="Head number must be .*, not 'first'"):
        LinearHead(config, head=head, number="first")
    with pytest.raises(ValueError, match="Head number must be .*, not 5"):
        LinearHead(config, head=head, number=5)
    other = config.replace(predictor="none")
    with pytest.raises(ValueError, match="Predictor must be perceptron, not 'none'"):
        LinearHead(other, head=head, number=0)


def test_states_its_cycles():
    head = HeadConfig(name="P1", rows=("A", "C", "D"), diagonals=("B", "G", "T", "T2", "Q"))
    heads = (head, HeadConfig(name="P0"))
    config = _device(PRESETS["qwen3-30b-a3b"], "compressed", heads=heads, lanes=8, list_entries=8)
    block = LinearHead(config, head=head, number=0)
    assert block.active_words({"A", "D", "B"}) == 16
    assert block.predict_cycles(24) == 47
    assert block.learn_cycles(24) == 160
