"""Snapshots of predictor tables: the file, the driver's methods and the command."""

import dataclasses
import hashlib
import json
import re
import struct

import numpy as np
import pytest

import prestage
from prestage.cli import main
from prestage.errors import ArgumentError, BadTableError, LinkError
from prestage.output import OutputError
from prestage.replay import device_config, replay
from prestage.snapshot import MAGIC, VERSION, Snapshot, SnapshotError, read_snapshot
from prestage_hw.contract import MESSAGES, ModelConfig, register_hash
from prestage_hw.contract.params import TINY_DEVICE as CONFIG
from prestage_hw.contract.registers import COUNTERS
from prestage_sim.traces import Trace, save_trace

LENGTHS = (192, 16)


def random_tables(seed=1):
    rng = np.random.default_rng(seed)
    return {
        number: rng.integers(0, 1 << 32, words, dtype=np.uint32)
        for number, words in enumerate(LENGTHS)
    }


def learned_tables():
    """Tables as the device keeps them."""
    with prestage.open("model://", config=CONFIG) as device:
        teach(device, 30)
        return device.snapshot()


def teach(device, tokens, *, seed=5):
    rng = np.random.default_rng(seed)
    for token in range(tokens):
        device.begin_token(0, token)
        for layer in range(4):
            device.route(0, layer, rng.permutation(8)[:2])
            device.sync()
            device.release(0, layer)


def walk(tokens=60, *, seed=3, layers=4, experts=8, top_k=2):
    """A trace in which experts follow each other."""
    rng = np.random.default_rng(seed)
    start = rng.integers(experts, size=(tokens, 1, 1))
    chosen = (start + np.arange(layers)[:, None] + np.arange(top_k) * 3) % experts
    noise = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=-1)[..., :top_k]
    chosen = np.where(rng.random((tokens, layers, 1)) < 0.8, chosen, noise)
    return Trace(experts=chosen, experts_per_layer=experts, meta={"model": "test-moe"})


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "learned.tables"
    file.write_bytes(Snapshot.of(CONFIG, random_tables()).encode())
    return file


def raises(kind, text):
    return pytest.raises(kind, match=re.escape(text))


# --- the file


def test_form(path):
    """The bytes are those of the documented form, taken apart by hand."""
    data = path.read_bytes()
    assert data[:8] == b"PRSTTABL" == MAGIC
    version, header_bytes, length = struct.unpack("<IIQ", data[8:24])
    assert version == 1 == VERSION and length == len(data)
    header = json.loads(data[24 : 24 + header_bytes])
    assert header == {
        "model": "tiny",
        "layers": 4,
        "experts": 8,
        "top_k": 2,
        "predictor": "st_moe",
        "form": "",
        "parameters": {"contexts": 2, "successors": 8},
        "register_hash": register_hash(),
        "tables": list(LENGTHS),
    }
    words = np.frombuffer(data[24 + header_bytes : -32], "<u4")
    np.testing.assert_array_equal(words, np.concatenate(list(random_tables().values())))
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()


def test_round_trip(path):
    snapshot = read_snapshot(path)
    snapshot.check(CONFIG)
    # What has no effect on tables may differ.
    snapshot.check(CONFIG.replace(slots=20, expert_bytes=2048, data_bytes=8))
    assert snapshot.words == sum(LENGTHS)
    for number, words in random_tables().items():
        assert snapshot.tables[number].dtype == np.uint32
        np.testing.assert_array_equal(snapshot.tables[number], words)
    assert snapshot.encode() == path.read_bytes()


def test_every_truncation_is_refused(path):
    data = path.read_bytes()
    for size in range(0, len(data), 7):
        with pytest.raises(SnapshotError) as caught:
            Snapshot.decode(data[:size])
        wanted = "must begin with" if size < 8 else f"not {size}: it is truncated"
        assert wanted in str(caught.value)


def test_every_flipped_bit_is_refused(path):
    data = path.read_bytes()
    rng = np.random.default_rng(2)
    for at in [*range(24 + 260), *rng.integers(24, len(data), 200), len(data) - 1]:
        damaged = bytearray(data)
        damaged[at] ^= 1 << rng.integers(8)
        with pytest.raises(SnapshotError):
            Snapshot.decode(bytes(damaged))


def forged(data, **changes):
    """The same snapshot with another header, and a digest that is right."""
    header_bytes = struct.unpack_from("<I", data, 12)[0]
    header = {**json.loads(data[24 : 24 + header_bytes]), **changes}
    header = {name: value for name, value in header.items() if value is not None}
    text = json.dumps(header).encode()
    body = text + data[24 + header_bytes : -32]
    body = data[:12] + struct.pack("<IQ", len(text), 24 + len(body) + 32) + body
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda d: b"", "must begin with b'PRSTTABL', not b'': this is no snapshot of tables"),
        (lambda d: b"PK\3\4" + d[4:], r"must begin with b'PRSTTABL', not b'PK\x03\x04TABL'"),
        (lambda d: d[:8] + struct.pack("<I", 2) + d[12:], "Snapshot version must be 1, not 2"),
        (lambda d: d[:10], "must be at least 56 bytes long, not 10: it is truncated"),
        (lambda d: d[:100], "bytes long, not 100: it is truncated"),
        (lambda d: d + b"\0", "it is damaged"),
        (lambda d: d[:300] + bytes([d[300] ^ 4]) + d[301:], "with the SHA-256"),
        (lambda d: forged(d, tables=[192, 17]), "Snapshot must have a header of version 1, but"),
        (lambda d: forged(d, tables=[192]), "Snapshot must have a header of version 1, but"),
        (lambda d: forged(d, tables=[-1, 209]), "Snapshot must have a header of version 1, but"),
        (lambda d: forged(d, tables=None), "Snapshot must have a header of version 1, but"),
        (lambda d: forged(d, tables="many"), "Snapshot must have a header of version 1, but"),
        (lambda d: forged(d, layers="4"), "Snapshot must have a header of version 1, but"),
        (lambda d: forged(d, predictor=None), "Snapshot must have a header of version 1, but"),
        (lambda d: forged(d, colour="red"), "Snapshot must have a header of version 1, but"),
    ],
)
def test_files_that_are_refused(path, change, text):
    """Each names the file, the rule and what was found, and nothing reaches the device."""
    path.write_bytes(change(path.read_bytes()))
    with raises(SnapshotError, text) as caught:
        read_snapshot(path)
    assert str(caught.value).startswith(f"{path}: ")
    with prestage.open("model://", config=CONFIG) as device:
        sent = watch(device)
        with raises(SnapshotError, text):
            device.load_tables(path)
        assert sent == []


def watch(device):
    """Messages that the device is sent from now on."""
    sent = []
    post = device._link.post

    def note(code, body=b"", **options):
        sent.append(code)
        post(code, body, **options)

    device._link.post = note
    return sent


def shape(**changes):
    return dataclasses.replace(CONFIG.model, **changes)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            CONFIG.replace(predictor="none"),
            "Snapshot must be of the predictor none, not st_moe",
        ),
        (
            CONFIG.replace(model=shape(layers=5)),
            "Snapshot must be of a model with 5 layers, 8 experts and k = 2, not 4, 8 and 2",
        ),
        (
            CONFIG.replace(model=shape(experts=9)),
            "Snapshot must be of a model with 4 layers, 9 experts and k = 2, not 4, 8 and 2",
        ),
        (
            CONFIG.replace(contexts=1),
            "Snapshot must be of a predictor with contexts = 1, not 2",
        ),
        (
            CONFIG.replace(successors=4),
            "Snapshot must be of a predictor with successors = 4, not 8",
        ),
    ],
)
def test_other_devices_are_refused(path, config, text):
    with prestage.open("model://", config=config) as device:
        sent = watch(device)
        with raises(SnapshotError, text):
            device.load_tables(path)
        assert sent == []


def test_parameters_of_the_perceptron_count():
    config = CONFIG.replace(predictor="perceptron", model=shape(layers=6, experts=32))
    snapshot = Snapshot.of(config, random_tables())
    snapshot.check(config.replace(successors=3))
    other = config.replace(
        perceptron=dataclasses.replace(
            config.perceptron, token_rows=2 * config.perceptron.token_rows
        )
    )
    rows = config.perceptron.token_rows
    with raises(SnapshotError, f"perceptron.token_rows = {2 * rows}, not {rows}"):
        snapshot.check(other)
    assert Snapshot.decode(snapshot.encode()).form == config.form


def test_tables_of_a_perceptron_of_ones_own(tmp_path, capsys):
    """The command makes the device that the snapshot is of; a named form is another one."""
    config = CONFIG.replace(predictor="perceptron", model=shape(layers=6, experts=32))
    config = config.replace(perceptron=dataclasses.replace(config.perceptron, token_rows=64))
    file = tmp_path / "a.tables"
    with prestage.open("model://", config=config) as device:
        device.save_tables(file)
    assert main(["tables", "load", str(file)]) == 0
    assert "words loaded" in capsys.readouterr().out
    text = refused(capsys, "tables", "load", file, "--form", "lite")
    assert "Snapshot must be of a predictor with perceptron.token_rows = 512, not 64" in text
    assert main(["tables", "info", str(file), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["form"] == "lite" and info["parameters"]["perceptron"]["token_rows"] == 64


def test_what_is_no_set_of_tables_is_not_saved():
    with raises(ArgumentError, "Predictor must have tables to save, but none has none"):
        Snapshot.of(CONFIG.replace(predictor="none"), {})
    with raises(ArgumentError, "Tables must be numbered from 0 on, not [1]"):
        Snapshot.of(CONFIG, {1: random_tables()[1]})


# --- the driver


def test_save_and_load(tmp_path):
    path = tmp_path / "a.tables"
    with prestage.open("model://", config=CONFIG) as device:
        teach(device, 30)
        saved = device.save_tables(path)
        teach(device, 3, seed=6)
        assert any((device.save_table(n) != t).any() for n, t in saved.tables.items())
        device.load_tables(str(path))
        for number, words in saved.tables.items():
            np.testing.assert_array_equal(device.save_table(number), words)
    # A word is read and written one by one as well.
    with prestage.open("model://", config=CONFIG) as device:
        device.load_tables(saved)
        device.write_register("table_address", 3)
        assert device.read_register("table_data") == saved.tables[0][3]
        assert device.read_register("table_address") == 4


def test_failed_save_leaves_the_file(tmp_path):
    path = tmp_path / "missing" / "a.tables"
    with prestage.open("model://", config=CONFIG) as device:
        with raises(OutputError, f"Snapshot {path} can't be written"):
            device.save_tables(path)
    with prestage.open("model://", config=CONFIG.replace(predictor="none")) as device:
        with raises(ArgumentError, "Predictor must have tables to save, but none has none"):
            device.save_tables(tmp_path / "a.tables")
    assert list(tmp_path.iterdir()) == []


def test_missing_file(tmp_path):
    with prestage.open("model://", config=CONFIG) as device:
        with raises(SnapshotError, f"Snapshot {tmp_path / 'no'} can't be read: No such file"):
            device.load_tables(tmp_path / "no")


def test_device_that_gives_other_words_than_asked_for():
    with prestage.open("model://", config=CONFIG) as device:
        values = MESSAGES["TABLE_DATA"].record.pack(CONFIG, 0, 4, (1, 2, 3, 4))
        top = device.pipe.top
        top.handle = lambda code, body: [(MESSAGES["TABLE_DATA"].code, values)]
        with raises(LinkError, "Table data must be of table 0, word 0, not table 0, word 4"):
            device._read_words(0, [], 4)


def test_words_that_do_not_exist():
    with prestage.open("model://", config=CONFIG) as device:
        with raises(BadTableError, "BAD_TABLE: table 1, word 0"):
            device._read_words(1, [], 17)


def counters_of(run):
    return {counter.name: run.counters[counter.name] for counter in COUNTERS}


def replayed(url, trace, *, save_at=()):
    config = device_config(trace, slots=10, expert_bytes=512)
    saved = []
    with prestage.open(url, config=config) as device:

        def progress(done):
            if done in save_at:
                saved.append(device.snapshot())

        run = replay(device, trace, progress=progress)
        return counters_of(run), device.snapshot(), saved


def test_saving_in_the_middle_disturbs_nothing(saves="model://"):
    trace = walk()
    plain = replayed(saves, trace)
    saved = replayed(saves, trace, save_at=(1, 20, 21, 45))
    assert plain[0] == saved[0] and plain[0]["candidates"] > 100
    for number, words in plain[1].items():
        np.testing.assert_array_equal(words, saved[1][number])
    # What was saved in the middle is what a shorter replay ends with.
    short = replayed(saves, trace.first(20))
    for number, words in short[1].items():
        np.testing.assert_array_equal(words, saved[2][1][number])


# --- the command


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.npz"
    save_trace(path, walk())
    return str(path)


def refused(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line.removeprefix("prestage: error: ")


def test_replay_from_a_snapshot(tmp_path, trace, capsys):
    """A profile made on one trace warms the run of another, and ends in the same tables."""
    other = tmp_path / "other.npz"
    save_trace(other, walk(seed=8))
    first, cold, warm = (tmp_path / name for name in ("first.tables", "cold.json", "warm.json"))
    assert main(["replay", trace, "--quiet", "--save-tables", str(first)]) == 0
    assert main(["replay", str(other), "--quiet", "--json", str(cold)]) == 0
    page = tmp_path / "warm.html"
    assert main(
        ["replay", str(other), "--quiet", "--json", str(warm), "--tables", str(first)]
        + ["--report", str(page)]
    ) == 0  # fmt: skip
    cold, warm = json.loads(cold.read_text()), json.loads(warm.read_text())
    assert warm["config"]["profiled"] and not cold["config"]["profiled"]
    assert warm["metrics"]["recall"] > cold["metrics"]["recall"] + 0.02
    # Without a token nothing is learned: the tables come back as they were.
    config = device_config(walk())
    with prestage.open("model://", config=config) as device:
        device.load_tables(first)
        second = device.save_tables(tmp_path / "second.tables")
    assert second.encode() == first.read_bytes()
    assert capsys.readouterr().err == ""


def test_replay_refuses_bad_snapshots(tmp_path, path, trace, capsys):
    replay_it = ("replay", trace, "--quiet")
    text = refused(capsys, *replay_it, "--tables", path)
    assert text == "Snapshot must be of a predictor with contexts = 1, not 2"
    text = refused(capsys, *replay_it, "--tables", path, "--predictor", "none")
    assert text == "Snapshot must be of the predictor none, not st_moe"
    text = refused(capsys, *replay_it, "--tables", trace)
    assert text.startswith(f"{trace}: Snapshot must begin with b'PRSTTABL', not b'PK")
    text = refused(capsys, *replay_it, "--tables", path, "--profile", trace)
    assert text == "Replay must start from --tables or --profile, not from both"
    text = refused(capsys, *replay_it, "--save-tables", tmp_path / "no" / "a")
    assert text.startswith(f"Snapshot {tmp_path / 'no' / 'a'} can't be written")
    text = refused(capsys, *replay_it, "--save-tables", tmp_path / "a", "--predictor", "none")
    assert text == "Predictor must have tables to save, but none has none"
    assert sorted(f.name for f in tmp_path.iterdir()) == ["learned.tables", "trace.npz"]


def test_failed_device_saves_nothing(tmp_path, trace, capsys):
    file = tmp_path / "a.tables"
    arguments = ["replay", trace, "--device", "model://?error=0:99999", "--save-tables", str(file)]
    assert main(arguments) == 1
    assert not file.exists()
    capsys.readouterr()


def test_disk_full_after_a_replay(tmp_path, trace, capsys):
    data = tmp_path / "run.json"
    arguments = ["--save-tables", "/dev/full", "--json", str(data)]
    assert main(["replay", trace, *arguments]) == 2
    assert json.loads(data.read_text())["complete"] is True
    captured = capsys.readouterr()
    assert "recall" in captured.out
    assert "Snapshot /dev/full can't be written: No space left on device" in captured.err


def test_tables_commands(tmp_path, capsys):
    file = tmp_path / "a.tables"
    device = ("--model", "tiny", "--contexts", "2")
    assert main(["tables", "save", str(file), "--device", "model://", *device]) == 0
    assert capsys.readouterr().out == f"{file}: 2 tables, 208 words saved\n"
    file.write_bytes(Snapshot.of(CONFIG, learned_tables()).encode())
    for options in ((), device, ("--slots", "9", "--layers", "4"), ("--tile-bytes", "1024")):
        assert main(["tables", "load", str(file), *options]) == 0
        assert capsys.readouterr().out == f"{file}: 2 tables, 208 words loaded\n"
    assert main(["tables", "info", str(file)]) == 0
    out = capsys.readouterr().out
    for word in ("st_moe", "192 words, 16 words", '{"contexts": 2, "successors": 8}', "tiny"):
        assert word in out
    assert main(["tables", "info", str(file), "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["tables"], info["predictor"], info["form"]) == ([192, 16], "st_moe", None)


def test_tables_commands_refuse(tmp_path, path, capsys):
    file = tmp_path / "a.tables"
    text = refused(capsys, "tables", "save", file)
    assert text == "Device needs --model, or --layers, --experts and --top-k"
    text = refused(capsys, "tables", "save", file, "--model", "tiny", "--predictor", "none")
    assert text == "Predictor must have tables to save, but none has none"
    text = refused(capsys, "tables", "save", file, "--model", "huge")
    assert text.startswith("Model preset must be one of ")
    text = refused(capsys, "tables", "save", file, "--model", "tiny", "--slots", "1")
    assert text == "Slot count must be at least contexts x top-k = 2, not 1"
    text = refused(capsys, "tables", "save", tmp_path / "no" / "a", "--model", "tiny")
    assert text.startswith("Snapshot ") and "can't be written" in text
    assert not file.exists()
    text = refused(capsys, "tables", "load", file)
    assert text == f"Snapshot {file} can't be read: No such file or directory"
    text = refused(capsys, "tables", "load", path, "--contexts", "1")
    assert text == "Snapshot must be of a predictor with contexts = 1, not 2"
    text = refused(capsys, "tables", "load", path, "--model", "mixtral-8x7b")
    assert text.startswith("Snapshot must be of a model with 32 layers, 8 experts and k = 2, not")
    text = refused(capsys, "tables", "load", path, "--device", "usb://")
    assert text.startswith("Device URL must start with one of ")
    path.write_bytes(path.read_bytes()[:-1])
    for action in ("load", "info"):
        assert "it is truncated" in refused(capsys, "tables", action, path)


def test_model_of_ones_own(tmp_path, capsys):
    file = tmp_path / "a.tables"
    own = ("--layers", "3", "--experts", "6", "--top-k", "2", "--successors", "3")
    assert main(["tables", "save", str(file), *own]) == 0
    capsys.readouterr()
    snapshot = read_snapshot(file)
    config = CONFIG.replace(
        model=ModelConfig(name="custom", layers=3, experts=6, top_k=2), contexts=1, successors=3
    )
    snapshot.check(config)
    assert main(["tables", "load", str(file)]) == 0
