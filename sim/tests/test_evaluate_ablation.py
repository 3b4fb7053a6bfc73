"""Forms of the perceptron taken apart: recall against whole evaluations, costs by hand."""

import json

import numpy as np
import pytest

from prestage_hw.contract import DeviceConfig, ModelConfig
from prestage_hw.contract.perceptron import FORMS, HeadConfig, PerceptronConfig, perceptron_form
from prestage_sim.evaluate.ablation import (
    MARKERS,
    Variant,
    ablate,
    main,
    prediction_cycles,
    render,
    row_bits,
    table_bits,
    variants,
    weight_bits,
)
from prestage_sim.evaluate.run import evaluate
from prestage_sim.traces import Trace, TraceError, save_trace

MODEL = ModelConfig(name="test-moe", layers=5, experts=16, top_k=3)


def walk(tokens, *, seed=0, layers=5, experts=16, top_k=3):
    """A trace whose routing follows the token and the layer before, with some noise."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 12, tokens)
    weights = np.random.default_rng(99).normal(size=(12 + experts, layers, experts))
    chosen = np.zeros((tokens, layers, top_k), np.int64)
    for t in range(tokens):
        before = []
        for m in range(layers):
            score = weights[ids[t], m] + sum(weights[12 + e, m] for e in before) / 2
            score = score + rng.normal(size=experts) / 3
            before = np.argsort(-score)[:top_k].tolist()
            chosen[t, m] = before
    return Trace(
        experts=chosen,
        experts_per_layer=experts,
        token=ids.astype(np.int32),
        request_id=np.arange(tokens) // 40,
        meta={"model": "test-moe"},
    )


def device(config, *, model=MODEL):
    return DeviceConfig(model=model, slots=8, predictor="perceptron", perceptron=config)


@pytest.mark.parametrize("form", ["lite", "full"])
@pytest.mark.parametrize("warm", [False, True])
def test_base_is_what_evaluate_measures(form, warm):
    traces = [walk(150, seed=1), walk(120, seed=2)]
    result = ablate(traces, form=form, horizons=(1, 3), warm_others=warm, groups=())
    (row,) = result.rows
    for horizon in (1, 3):
        found = [
            evaluate(
                trace,
                predictor=f"perceptron:form={form}",
                horizons=(horizon,),
                warm=[traces[1 - at]] if warm else [],
            )[0]
            for at, trace in enumerate(traces)
        ]
        mean = np.mean([one.recall_at_k for one in found])
        assert row.recall_at_k[horizon] == pytest.approx(mean, abs=1e-12)
        mean = np.mean([one.recall_at_2k for one in found])
        assert row.recall_at_2k[horizon] == pytest.approx(mean, abs=1e-12)
    assert result.warm_others == warm and result.tokens == 270


@pytest.mark.parametrize(
    "change, option",
    [
        ("8 entries of the table by token", "token_rows=8"),
        ("lists of 8", "list_entries=8"),
    ],
)
def test_a_variant_is_what_evaluate_measures(change, option, monkeypatch):
    trace = walk(200)
    small = perceptron_form("lite").replace(token_rows=16, lanes=4)
    monkeypatch.setitem(FORMS, "small", type(FORMS["lite"])("for this test", small))
    result = ablate([trace], form="small", groups=("lists", "sizes"))
    (row,) = [row for row in result.rows if row.change == change]
    (one,) = evaluate(trace, predictor=f"perceptron:form=small:{option}")
    assert row.recall_at_k[1] == pytest.approx(one.recall_at_k, abs=1e-12)
    assert row.recall_at_k[1] != result.rows[0].recall_at_k[1]


def test_removal_is_what_evaluate_measures():
    trace = walk(200)
    result = ablate([trace], form="full", groups=("P1",))
    rows = {row.change: row for row in result.rows}
    # Layer 0 is P0's, which has no crosses: the option takes them from every head.
    (one,) = evaluate(trace, predictor="perceptron:form=full:without=AC")
    assert rows["without conjunction AC"].recall_at_k[1] == pytest.approx(
        one.recall_at_k, abs=1e-12
    )
    assert "with row T2" in rows and "with diagonal T2" not in rows


def test_p0_in_place_of_p1():
    trace = walk(200)
    result = ablate([trace], form="lite", horizons=(1, 2), groups=("head",))
    rows = {row.change: row for row in result.rows}
    # Lite has no P2: at horizon 2 all layers are P0's.
    instead = rows["P0 in place of P1"]
    assert instead.recall_at_k[1] == result.rows[0].recall_at_k[2]
    assert instead.recall_at_k[2] == result.rows[0].recall_at_k[2]
    lite = perceptron_form("lite")
    p1 = weight_bits(device(lite), lite.head("P1"))
    assert instead.weight_bits == result.rows[0].weight_bits - p1
    assert rows["without R"].reuse_hits is None
    assert rows["without R"].recall_at_k == result.rows[0].recall_at_k


def test_reuse_hits_of_what_never_changes():
    experts = np.tile(np.array([[0, 3, 5]]), (50, 5, 1))
    trace = Trace(experts=experts, experts_per_layer=16, meta={"model": "test-moe"})
    result = ablate([trace], form="lite", groups=())
    assert result.rows[0].reuse_hits == pytest.approx(49 / 50)


def test_reuse_hits_prefer_what_comes_back():
    # Expert 0 is chosen every other token, the other fifteen take turns. Of four slots one
    # is for expert 0 and one for the present one; the others hit two turns in fifteen at most.
    others = 1 + np.arange(600) % 15
    chosen = np.where(np.arange(600) % 2, 0, others)
    trace = Trace(
        experts=np.tile(chosen[:, None, None], (1, 2, 1)),
        experts_per_layer=16,
        meta={"model": "test-moe"},
    )
    result = ablate([trace], form="lite", groups=())
    assert 0.49 <= result.rows[0].reuse_hits <= 0.5 * (1 + 2 / 15)


def heads(**p1):
    return (HeadConfig(name="P1", **p1), HeadConfig(name="P0"))


def test_bits_of_full_rows():
    config = device(
        PerceptronConfig(
            heads=heads(rows=("A", "C"), crosses=("AA",), diagonals=("B",)), lanes=8, cross_rows=64
        )
    )
    p1, p0 = config.perceptron.heads
    # 16 experts in 2 beats; a word has 8 weights, a stage and one bit of parity.
    words = (2 * 5 * 16 + 5 * 64) * 2
    assert row_bits(config, p1) == words * (64 + 2 + 1)
    assert weight_bits(config, p1) == words * 67 + 5 * 2 * 2 * (64 + 1)
    assert row_bits(config, p0) == 0


def test_bits_of_lists_and_of_wide_weights():
    reuse = HeadConfig(name="R", rows=("B",))
    config = device(
        PerceptronConfig(heads=(*heads(rows=("A",)), reuse), lanes=4, list_entries=8), model=MODEL
    )
    p1 = config.perceptron.heads[0]
    # Two beats of four entries; an entry is about one of two experts.
    assert row_bits(config, p1) == 5 * 16 * 2 * (4 * (8 + 1) + 2 + 1)
    assert row_bits(config, reuse) == 5 * 16 * 2 * (4 * (12 + 1) + 2 + 1)


def test_bits_of_token_tables():
    choice, tag = 5 * (3 * 4 + 2), 18
    for diagonals, bits in (
        (("B",), 0),
        (("T",), 16 * (choice + tag)),
        (("T", "T2"), 16 * (2 * choice + tag)),
        (("Q",), 32 * (choice + tag)),
        (("T", "Q", "S"), 64 * (choice + tag)),
    ):
        config = PerceptronConfig(heads=heads(diagonals=diagonals), token_rows=16, pair_rows=32)
        assert table_bits(device(config)) == bits


@pytest.mark.parametrize(
    "name, form, cycles",
    [
        # Two words a row of 16 experts: features, then conjunctions, then the diagonal's beats.
        ("P1", {"rows": ("A", "C"), "crosses": ("AC", "AA", "AB")}, (2 * 3 + 4 + 3 + 4) * 2 + 2),
        ("P1", {"diagonals": ("B", "T")}, 2),
        ("P0", {"rows": ("B",)}, 3 * 2 + 2),
    ],
)
def test_cycles(name, form, cycles):
    head = HeadConfig(name=name, **form)
    other = HeadConfig(name="P0" if name == "P1" else "P1")
    both = (head, other) if name == "P1" else (other, head)
    config = device(PerceptronConfig(heads=both, lanes=8))
    assert prediction_cycles(config, head) == cycles


def test_cycles_of_lists():
    head = HeadConfig(name="P1", rows=("A",))
    config = device(
        PerceptronConfig(heads=(head, HeadConfig(name="P0")), lanes=4, list_entries=8),
    )
    assert prediction_cycles(config, head) == 3 * 2 + 4


@pytest.mark.parametrize("form", list(FORMS))
def test_variants(form):
    config = perceptron_form(form)
    found = variants(config, model=MODEL, horizons=(1,))
    assert found[0] == Variant(group="", change="as it is", config=config)
    assert len({(variant.group, variant.change) for variant in found}) == len(found)
    assert all(variant.config != config for variant in found[1:])
    groups = {variant.group for variant in found}
    assert groups >= {"head", "P1", "P0", "R", "lists"} and not groups & {"P2", "P3"}
    for head in config.heads:
        if head.name in ("P1", "P0", "R"):
            names = {v.change for v in found if v.group == head.name}
            assert {f"without row {name}" for name in head.rows} <= names
            assert {f"without conjunction {name}" for name in head.crosses} <= names
            assert {f"without diagonal {name}" for name in head.diagonals} <= names
    changes = {variant.change for variant in found if variant.group == "lists"}
    lists = {"full rows", "lists of 4", "lists of 8"}
    kept = f"lists of {config.list_entries}" if config.list_entries else "full rows"
    assert changes == lists - {kept}


def test_variants_of_far_heads():
    groups = {v.group for v in variants(perceptron_form("full"), model=MODEL, horizons=(1, 3))}
    assert "P3" in groups and "P2" not in groups


def test_tables():
    result = ablate([walk(60)], form="full", horizons=(1,), names=["here/a.npz"])
    text = render([result], command="python -m something")
    assert text.startswith("```sh\npython -m something\n```\n")
    assert "## `full`, test-moe" in text and "Mean over a: 60 tokens, cold." in text
    lines = text.splitlines()
    assert "### P1, the next layer" in lines
    (line,) = [line for line in lines if line.startswith("| lists of 4 |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    row = [row for row in result.rows if row.change == "lists of 4"][0]
    gain = 100 * (row.recall_at_k[1] - result.rows[0].recall_at_k[1])
    assert float(cells[1] or 0) == pytest.approx(gain, abs=0.005)
    bits = (row.weight_bits - result.rows[0].weight_bits) / 1000
    assert float(cells[4]) == pytest.approx(bits, abs=0.5)


@pytest.fixture
def paths(tmp_path):
    found = []
    for seed, experts in ((1, 16), (2, 16), (3, 8)):
        path = tmp_path / f"t{seed}.npz"
        save_trace(path, walk(40, seed=seed, experts=experts))
        found.append(str(path))
    return found


def test_command(paths, tmp_path, capsys):
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    page.write_text(f"# Mine\n\n{MARKERS[0]}\nformer\n{MARKERS[1]}\n\nKept.\n")
    arguments = [*paths, "--warm-others", "--form", "lite", "--horizon", "1,3", "--first", "30"]
    arguments += ["--group", "head", "--json", str(numbers), "--markdown", str(page)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    text = page.read_text()
    assert text.startswith(f"# Mine\n\n{MARKERS[0]}\n\n```sh\npython -m")
    assert text.endswith(f"{MARKERS[1]}\n\nKept.\n") and "former" not in text
    assert printed in text
    first, second = json.loads(numbers.read_text())
    assert (first["experts"], first["tokens"], first["warm_others"]) == (16, 60, True)
    assert (second["experts"], second["tokens"], second["warm_others"]) == (8, 30, False)
    assert first["rows"][0]["recall_at_k"].keys() == {"1", "3"}
    # A second run finds its own page.
    assert main(arguments) == 0
    assert page.read_text() == text


def test_command_writes_a_new_page(paths, tmp_path):
    page = tmp_path / "new.md"
    arguments = [paths[0], "--form", "lite", "--group", "head", "--quiet", "--markdown", str(page)]
    assert main(arguments) == 0
    assert page.read_text().startswith(f"# Ablations\n\n{MARKERS[0]}\n")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nothing.npz"], "nothing.npz: no such file"),
        (["TRACE", "--form", "huge"], "Predictor form must be one of lite, compressed, full"),
        (["TRACE", "--horizon", "5"], "Horizon must be between 1 and 4, not 5"),
        (["TRACE", "--horizon", "x"], "must be numbers such as 1,3, not 'x'"),
        (["TRACE", "--first", "0"], "Token count must be a positive integer, not 0"),
        (["TRACE", "--json", "no/such/x.json"], "there is no directory no/such"),
        (["TRACE", "--markdown", "FOLDER"], "it is a directory"),
        (["TRACE", "--markdown", "PAGE"], "must have one line <!-- ablations begin -->"),
    ],
)
def test_command_refuses(arguments, message, paths, tmp_path, capsys):
    (tmp_path / "page.md").write_text("# A page\n")
    stands = {"TRACE": paths[0], "FOLDER": str(tmp_path), "PAGE": str(tmp_path / "page.md")}
    with pytest.raises(SystemExit) as stopped:
        main([stands.get(argument, argument) for argument in arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_refuses():
    with pytest.raises(ValueError, match="at least one trace"):
        ablate([])
    with pytest.raises(ValueError, match="at least one horizon"):
        ablate([walk(10)], horizons=())
    with pytest.raises(ValueError, match="Group must be one of head, P1, .*, not 'all'"):
        ablate([walk(10)], groups=("all",))
    with pytest.raises(TraceError, match="same layers, experts and k"):
        ablate([walk(10), walk(10, experts=8)])
