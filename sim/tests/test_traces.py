"""Traces: every format in and out, and everything that can be wrong with one."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest

from prestage_sim.traces import (
    FORMATS,
    Trace,
    TraceError,
    format_of,
    load_trace,
    model_config,
    save_trace,
)

SHARED = Path(__file__).resolve().parents[3] / "shared" / "traces"


def routing(tokens=6, layers=3, experts=8, top_k=2, seed=1):
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)
    return order[..., :top_k].astype(np.int16)


def full_trace():
    rng = np.random.default_rng(2)
    experts = routing()
    return Trace(
        experts=experts,
        experts_per_layer=8,
        request_id=np.array([0, 0, 0, 0, 1, 1]),
        is_decode=np.array([False, False, True, True, False, True]),
        token=np.array([5, 9, -1, 7, 100000, 3]),
        layer_ids=np.array([1, 2, 5]),
        scores=rng.random(experts.shape).astype(np.float16),
        meta={"model": "someone/some-moe", "domain": "tests"},
    )


def same(one, two, *, meta=True):
    for name in ("experts", "request_id", "is_decode", "token", "layer_ids", "scores"):
        left, right = getattr(one, name), getattr(two, name)
        assert left.dtype == right.dtype, name
        np.testing.assert_array_equal(left, right, err_msg=name)
    assert one.experts_per_layer == two.experts_per_layer
    if meta:
        assert two.model == one.model
        assert two.meta["domain"] == one.meta["domain"]


@pytest.mark.parametrize("name", FORMATS)
def test_round_trip(tmp_path, name):
    trace = full_trace()
    path = tmp_path / f"trace{FORMATS[name][0]}"
    save_trace(path, trace)
    same(trace, load_trace(path))
    # The name of a format wins over the suffix.
    other = tmp_path / "trace.dat"
    save_trace(other, trace, name=name)
    same(trace, load_trace(other, name=name))


def test_round_trip_of_the_least(tmp_path):
    for name, suffixes in FORMATS.items():
        path = tmp_path / f"least{suffixes[0]}"
        save_trace(path, Trace(experts=np.array([[[1, 0]]])))
        trace = load_trace(path)
        assert (trace.tokens, trace.layers, trace.top_k, trace.experts_per_layer) == (1, 1, 2, 2)
        assert trace.scores is None, name
        assert trace.token.tolist() == [-1]
        assert trace.is_decode.tolist() == [True]


def test_first():
    trace = full_trace()
    part = trace.first(5)
    assert part.tokens == 5
    assert part.requests == 2
    np.testing.assert_array_equal(part.scores, trace.scores[:5])
    assert trace.first(100) is trace
    with pytest.raises(TraceError, match="Token count must be a positive integer, not 0"):
        trace.first(0)


def write_lines(path, *values):
    path.write_text("\n".join(json.dumps(value) for value in values) + "\n")
    return path


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return base64.b64encode(file.getvalue()).decode()


def test_vllm_nested_lists(tmp_path):
    """vLLM 0.21: nested lists, the prompt's beside the choices'."""
    experts = routing(tokens=5)
    path = write_lines(
        tmp_path / "vllm.jsonl",
        {
            "model": "Qwen/Qwen3-30B-A3B",
            "prompt_routed_experts": experts[:3].tolist(),
            "prompt_token_ids": [11, 12, 13],
            "choices": [
                {"routed_experts": experts[3:].tolist(), "token_ids": [14, 15, 16]},
                {"routed_experts": experts[3:4].tolist(), "token_ids": [17]},
            ],
        },
    )
    trace = load_trace(path)
    np.testing.assert_array_equal(trace.experts[:5], experts)
    np.testing.assert_array_equal(trace.experts[5:], experts[:4])
    assert trace.request_id.tolist() == [0] * 5 + [1] * 4
    assert trace.is_decode.tolist() == [False] * 3 + [True] * 2 + [False] * 3 + [True]
    assert trace.token.tolist() == [11, 12, 13, 14, 15, 11, 12, 13, 17]
    # The preset of that name says how many experts there are.
    assert trace.experts_per_layer == 128


def test_vllm_npy(tmp_path):
    """Newer vLLM: one base64 .npy of prompt and output together."""
    experts = routing(tokens=4).astype(np.uint8)
    path = write_lines(
        tmp_path / "vllm.jsonl",
        {"prompt_token_ids": [1, 2], "choices": [{"routed_experts": npy(experts)}]},
    )
    trace = load_trace(path, experts=8)
    np.testing.assert_array_equal(trace.experts, experts)
    assert trace.is_decode.tolist() == [False, False, True, True]
    assert trace.token.tolist() == [1, 2, -1, -1]


def test_sglang(tmp_path):
    """SGLang: base64 of bare int32 numbers in meta_info, or in sglext of its OpenAI endpoints."""
    experts = routing(tokens=4)
    raw = base64.b64encode(experts.astype("<i4").tobytes()).decode()
    path = write_lines(
        tmp_path / "sglang.jsonl",
        {
            "text": "...",
            "output_ids": [7, 8],
            "meta_info": {"routed_experts": raw, "prompt_tokens": 3},
        },
        {"choices": [{"sglext": {"routed_experts": raw}}]},
    )
    trace = load_trace(path, layers=3, top_k=2, experts=8)
    np.testing.assert_array_equal(trace.experts, np.concatenate([experts, experts]))
    assert trace.is_decode.tolist() == [False] * 3 + [True] * 5
    with pytest.raises(TraceError, match="without a shape .* give --layers and --top-k"):
        load_trace(path)
    with pytest.raises(TraceError, match="24 numbers, which isn't a multiple of 5 layers x 2"):
        load_trace(path, layers=5, top_k=2)


def test_bare_arrays_and_one_pretty_value(tmp_path):
    experts = routing(tokens=2)
    lines = write_lines(tmp_path / "bare.jsonl", experts.tolist(), experts.tolist())
    assert load_trace(lines).requests == 2
    pretty = tmp_path / "pretty.json"
    pretty.write_text(json.dumps([{"routed_experts": experts.tolist()}], indent=1))
    np.testing.assert_array_equal(load_trace(pretty).experts, experts)


GOOD = [[[0, 1], [2, 3]]]


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ("{", "line 1: isn't JSON"),
        ("3", "line 1: must be an object or an array, not int"),
        ("{}", "line 1: has no 'routed_experts'"),
        ('{"choices": 3}', "'choices' must be an array of objects"),
        ('{"routed_experts": []}', "at least one token"),
        ("", "at least one token"),
        ('{"routed_experts": [[[0, 1], [2]]]}', "same number of experts in every row"),
        ('{"routed_experts": [[0, 1]]}', r"shape \[tokens, layers, top_k\], not int64 of shape"),
        ('{"routed_experts": [[[0.5, 1]]]}', "must be integers"),
        ('{"routed_experts": "!"}', "isn't base64"),
        (json.dumps({"routed_experts": npy(np.zeros(3, int))}), r"must have shape .*not \[3\]"),
        (
            json.dumps({"routed_experts": base64.b64encode(b"\x93NUMPY\x01").decode()}),
            "isn't a whole .npy",
        ),
        (
            json.dumps({"prompt_routed_experts": [[[0, 1]]], "routed_experts": GOOD}),
            r"prompt_routed_experts has shape \[tokens, 1, 2\]",
        ),
        (
            json.dumps({"routed_experts": GOOD}) + "\n" + json.dumps([[[0, 1]]]),
            r"request 1 has shape \[tokens, 1, 2\], but request 0 has \[tokens, 2, 2\]",
        ),
        (
            json.dumps({"routed_experts": GOOD, "token": [1, 2]}),
            r"Trace token must be integers of shape \[1\]",
        ),
        (
            json.dumps({"routed_experts": GOOD, "scores": [[[0.5]]]}),
            "scores must be numbers of the experts' shape",
        ),
    ],
)
def test_bad_json_lines(tmp_path, value, match):
    path = tmp_path / "bad.jsonl"
    path.write_text(value)
    with pytest.raises(TraceError, match=match) as caught:
        load_trace(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "header must name the columns"),
        ("step,layer\n0,0\n", "header must name the columns"),
        ("step,e0\n0,0\n", "header must name the columns step, layer, e0"),
        ("# {\nstep,layer,e0\n", "line 1: the comment isn't JSON"),
        ("step,layer,e0,e1\n", "at least one token"),
        ("step,layer,e0,e1\n0,0,1\n", "line 2: has 3 fields, but the header has 4"),
        ("step,layer,e0,e1\n0,0,1,x\n", "column e1 must hold numbers"),
        ("step,layer,e0,e1\n0,0,1,2\n0,1,1,2\n1,0,1,2\n", "every step must have the same 2 layers"),
        ("step,layer,e0,e1\n0,0,1,2\n1,1,1,2\n", "rows of one step must be contiguous"),
        ("step,layer,e0,e1\n0,0,1,1\n", "must be distinct"),
    ],
)
def test_bad_csv(tmp_path, text, match):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=match):
        load_trace(path)


def test_csv_of_the_least(tmp_path):
    path = tmp_path / "least.csv"
    path.write_text("step,layer,e0,e1\n0,3,1,2\n0,4,0,1\n")
    trace = load_trace(path)
    assert trace.experts.tolist() == [[[1, 2], [0, 1]]]
    assert trace.layer_ids.tolist() == [3, 4]
    assert trace.experts_per_layer == 3


def arrays(**changes):
    return {"experts": routing(), "meta": np.array('{"num_experts": 8}')} | changes


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"experts": np.full((1, 1, 2), -1)}, "between 0 and 7, but token 0, layer 0 has -1"),
        ({"experts": np.array([[[0, 1], [2, 8]]])}, "between 0 and 7, but token 0, layer 1 has 8"),
        ({"experts": np.array([[[3, 3]]])}, r"token 0, layer 0 has 3 twice: \[3, 3\]"),
        ({"experts": np.zeros((0, 3, 2), int)}, "at least one token"),
        ({"experts": np.zeros((3, 0, 2), int)}, "at least one layer"),
        ({"experts": np.zeros((3, 2))}, "must be integers of shape"),
        ({"experts": np.zeros((3, 2, 1))}, "must be integers of shape"),
        ({"meta": np.array("{")}, "meta array that isn't JSON"),
        ({"meta": np.array("3")}, "meta array that isn't a JSON object"),
        ({"meta": np.array('{"num_experts": "8"}')}, "num_experts must be an integer, not '8'"),
        ({"meta": np.array('{"num_experts": 0}')}, "num_experts must be a positive integer, not 0"),
        ({"meta": np.array('{"num_experts": 2000}')}, "2 to 1024 experts a layer, but has 2000"),
        ({"meta": np.array('{"top_k": 4}')}, "says top_k = 4 in its meta, but its arrays have 2"),
        ({"meta": np.array('{"tokens": 7}')}, "says tokens = 7"),
        ({"request_id": np.zeros(3, int)}, r"request_id must be integers of shape \[6\]"),
        ({"request_id": np.array([0, 1, 0, 0, 0, 0])}, "one request must be contiguous"),
        ({"scores": np.zeros((6, 3, 1))}, "scores must be numbers"),
    ],
)
def test_bad_npz(tmp_path, changes, match):
    path = tmp_path / "bad.npz"
    np.savez(path, **arrays(**changes))
    with pytest.raises(TraceError, match=match):
        load_trace(path)


def test_bad_files(tmp_path):
    with pytest.raises(TraceError, match="nothing.npz: no such file"):
        load_trace(tmp_path / "nothing.npz")
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(TraceError, match="is a directory"):
        load_trace(tmp_path / "folder.npz")
    path = tmp_path / "whole.npz"
    save_trace(path, full_trace())
    whole = path.read_bytes()
    cut = tmp_path / "cut.npz"
    for length in (0, 10, len(whole) // 2, len(whole) - 30):
        cut.write_bytes(whole[:length])
        with pytest.raises(TraceError, match="not a whole .npz file, it may be truncated"):
            load_trace(cut)
    np.savez(cut, other=np.zeros(3))
    with pytest.raises(TraceError, match="has no array 'experts', only: other"):
        load_trace(cut)
    np.savez(cut, experts=np.array([{}], dtype=object))
    with pytest.raises(TraceError, match="not a whole .npz"):
        load_trace(cut)
    (tmp_path / "bytes.csv").write_bytes(b"step,\xff\n")
    with pytest.raises(TraceError, match="not UTF-8"):
        load_trace(tmp_path / "bytes.csv")
    with pytest.raises(TraceError, match="File name too long"):
        load_trace(tmp_path / ("x" * 300 + ".npz"))


def test_shape_that_was_asked_for(tmp_path):
    path = tmp_path / "trace.npz"
    save_trace(path, full_trace())
    assert load_trace(path, layers=3, top_k=2, experts=8).tokens == 6
    with pytest.raises(TraceError, match="has layers 3, but 4 was asked for"):
        load_trace(path, layers=4)
    with pytest.raises(TraceError, match="has top-k 2, but 4 was asked for"):
        load_trace(path, top_k=4)
    with pytest.raises(TraceError, match="has 8 experts a layer, but 16 were asked for"):
        load_trace(path, experts=16)


def test_formats():
    assert format_of("a/B.NPZ") == "npz"
    assert format_of("x.ndjson") == "jsonl"
    with pytest.raises(TraceError, match="must end in one of .npz, .jsonl, .ndjson, .json, .csv"):
        format_of("trace.bin")
    with pytest.raises(TraceError, match="must be one of npz, jsonl, csv, not 'xml'"):
        format_of("trace.npz", name="xml")


@pytest.mark.parametrize(
    ("recorded", "shape", "name", "size"),
    [
        ("openai/gpt-oss-20b", (24, 32, 4), "gpt-oss-20b", 13219200),
        ("gpt-oss-20b-Q4_K_M.gguf", (24, 32, 4), "gpt-oss-20b", 13219200),
        ("Qwen3-30B-A3B-Q4_K_M.gguf", (48, 128, 6), "qwen3-30b-a3b", 9437184),
        ("openai/gpt-oss-20b", (23, 32, 4), "openai/gpt-oss-20b", 77),
        ("tinymoe", (4, 8, 2), "tinymoe", 77),
    ],
)
def test_model_config(recorded, shape, name, size):
    layers, experts, top_k = shape
    trace = Trace(
        experts=routing(tokens=1, layers=layers, experts=experts, top_k=top_k),
        experts_per_layer=experts,
        meta={"model": recorded, "expert_bytes": 77},
    )
    config = model_config(trace)
    assert (config.layers, config.experts, config.top_k) == shape
    assert (config.name, config.expert_bytes) == (name, size)


def test_model_config_beyond_a_device():
    trace = Trace(experts=routing(experts=32, top_k=17))
    with pytest.raises(TraceError, match="Top-k must be between 1 and 16, not 17"):
        model_config(trace)


def test_named():
    assert full_trace().named("gpt-oss-20b").model == "gpt-oss-20b"
    assert Trace(experts=routing()).model == "unknown"


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real traces in {SHARED}")
def test_real_traces(tmp_path):
    for path in sorted(SHARED.glob("*.npz")):
        trace = load_trace(path)
        assert model_config(trace).name in path.name
        part = trace.first(20)
        for name, suffixes in FORMATS.items():
            copy = tmp_path / f"copy{suffixes[0]}"
            save_trace(copy, part)
            same(part, load_trace(copy, name=name), meta=False)
