"""Dispatcher, accuracy and register bank of the golden model, against cases worked by hand."""

import numpy as np
import pytest

from prestage_hw.contract import MESSAGES, RECORDS, REGISTERS, DeviceConfig, ModelConfig
from prestage_hw.contract.pattern import expert_memory
from prestage_hw.contract.records import ErrorCode, Phase, Refusal
from prestage_hw.contract.registers import VERSION, register_by_name, register_hash
from prestage_sim.model.stats.accuracy import Accuracy
from prestage_sim.model.stats.counters import Counters
from prestage_sim.model.top import Top

CONFIG = DeviceConfig(
    model=ModelConfig(name="hand", layers=3, experts=6, top_k=2),
    slots=6,
    expert_bytes=512,
    contexts=2,
    data_bytes=16,
)


class Device:
    """Messages by name in, records by name out."""

    def __init__(self):
        self.top = Top(CONFIG, expert_memory(CONFIG))

    def __call__(self, name, *values):
        record = MESSAGES[name].record
        result = []
        for code, body in self.top.handle(MESSAGES[name].code, record.pack(CONFIG, *values)):
            message = next(m for m in MESSAGES.values() if m.code == code)
            result.append((message.name, message.record.unpack(CONFIG, body)))
        return result

    def read(self, name):
        ((kind, fields),) = self("REGISTER_READ", register_by_name(name).address)
        assert kind == "REGISTER_VALUE" and fields["register"] == register_by_name(name).address
        return fields["value"]

    def write(self, name, value):
        assert self("REGISTER_WRITE", register_by_name(name).address, value) == []


@pytest.fixture
def device():
    return Device()


def _event(code, *, ctx=0, layer=0, expert=0, address=0):
    fields = {"code": code, "ctx": ctx, "layer": layer, "expert": expert, "address": address}
    return [("EVENT", fields)]


def test_route_fills_the_least_recent_slots(device):
    answers = device("ROUTE", 1, 2, (4, 0))
    assert sorted(fields["slot"] for _, fields in answers) == [0, 1]
    assert {(kind, f["ctx"], f["layer"], f["expert"]) for kind, f in answers} == {
        ("READY", 1, 2, 4),
        ("READY", 1, 2, 0),
    }


@pytest.mark.parametrize(
    ("message", "event"),
    [
        (("BEGIN_TOKEN", 2, 1, 5), _event(ErrorCode.BAD_CONTEXT, ctx=2)),
        (("ROUTE", 2, 0, (0, 1)), _event(ErrorCode.BAD_CONTEXT, ctx=2)),
        (("ROUTE", 0, 3, (0, 1)), _event(ErrorCode.BAD_LAYER, layer=3)),
        (("ROUTE", 1, 1, (6, 6)), _event(ErrorCode.BAD_EXPERT, ctx=1, layer=1, expert=6)),
        (("ROUTE", 1, 1, (5, 5)), _event(ErrorCode.DUPLICATE_EXPERT, ctx=1, layer=1, expert=5)),
        (("RELEASE", 1, 1), _event(ErrorCode.UNROUTED, ctx=1, layer=1)),
        (("RELEASE", 3, 1), _event(ErrorCode.BAD_CONTEXT, ctx=3, layer=1)),
        (("HINT", 0, 5, 0, 255), _event(ErrorCode.BAD_LAYER, layer=5)),
        (("HINT", 0, 1, 7, 255), _event(ErrorCode.BAD_EXPERT, layer=1, expert=7)),
        (("READ", 6, 0, 1), _event(ErrorCode.BAD_READ, expert=6)),
        (("READ", 0, 31, 2), _event(ErrorCode.BAD_READ, address=31)),
        (("READ", 0, 0, 0), _event(ErrorCode.BAD_READ)),
        (("REGISTER_READ", 0x3FF), _event(ErrorCode.BAD_REGISTER, address=0x3FF)),
        (("REGISTER_WRITE", 0x00, 1), _event(ErrorCode.BAD_REGISTER, address=0)),
    ],
)
def test_refused_messages_change_nothing(device, message, event):
    assert device(*message) == event
    assert device.read("rejected") == 1
    assert device.read("routes") == device.read("tokens") == device.read("hints") == 0
    assert device.read("demands") == 0


def test_unknown_message(device):
    assert device.top.handle(0x33, b"") == [
        (
            MESSAGES["EVENT"].code,
            RECORDS["Event"].pack(CONFIG, ErrorCode.BAD_MESSAGE, 0, 0, 0, 0x33),
        )
    ]


def test_a_layer_is_routed_once_until_released(device):
    device("ROUTE", 0, 0, (0, 1))
    assert device("ROUTE", 0, 0, (2, 3)) == _event(ErrorCode.UNRELEASED)
    assert [kind for kind, _ in device("ROUTE", 1, 0, (2, 3))] == ["READY", "READY"]
    assert device("RELEASE", 0, 0) == []
    assert device("RELEASE", 0, 0) == _event(ErrorCode.UNROUTED)
    assert [kind for kind, _ in device("ROUTE", 0, 0, (2, 3))] == ["READY", "READY"]
    assert device.read("releases") == 1 and device.read("routes") == 3


def test_hints(device):
    device.write("hint_threshold", 100)
    device("HINT", 0, 1, 3, 255)
    assert device.read("hints") == 0  # Hints are off after reset.
    device.write("control", 3)
    device("HINT", 0, 1, 3, 99)
    assert device.read("hints") == 0  # Below the threshold.
    device("HINT", 0, 1, 3, 100)
    assert device.read("hints") == device.read("prefetch_issued") == 1
    device("ROUTE", 0, 0, (0, 1))
    ready = {f["expert"]: f["slot"] for _, f in device("ROUTE", 0, 1, (3, 2))}
    assert ready[3] == 0  # The hint took the least recent slot.
    assert device.read("hits") == device.read("useful") == 1
    assert device("HINT", 0, 1, 3, 255) == _event(ErrorCode.HINT_PASSED, layer=1, expert=3)
    device("BEGIN_TOKEN", 0, 1, 7)
    assert device("HINT", 0, 0, 3, 255) == []  # A new token begins before layer 0.


def test_chunk_of_tokens(device):
    """Three tokens a layer: what waits for the next layer does not grow stale meanwhile."""
    device.write("control", 3)
    device("BEGIN_TOKEN", 0, Phase.PREFILL, 0xFFFFFFFF)
    device("ROUTE", 0, 0, (0, 1))
    assert device("ROUTE", 0, 0, (2, 3)) == _event(ErrorCode.UNRELEASED)
    for experts in ((2, 3), (4, 5)):
        device("RELEASE", 0, 0)
        assert len(device("ROUTE", 0, 0, experts)) == 2
    assert device("HINT", 0, 0, 1, 255) == _event(ErrorCode.HINT_PASSED, expert=1)
    device("RELEASE", 0, 0)
    device("HINT", 0, 2, 1, 255)
    assert device.read("prefetch_issued") == 1
    for experts in ((1, 2), (3, 4), (5, 1)):
        device("ROUTE", 0, 1, experts)
        # Layer 1 has had its first route, layer 2 not yet.
        assert device("HINT", 0, 1, 0, 255) == _event(ErrorCode.HINT_PASSED, layer=1)
        assert device("HINT", 0, 2, experts[0], 255) == []
        device("RELEASE", 0, 1)
    assert device.read("routes") == 6
    assert device.read("prefetch_stale") == 0
    assert device.read("hints") == 4


def test_counters_of_a_chunk():
    """A layer is compared at its first decision, with all that was proposed before it."""
    counters = Counters()
    accuracy = Accuracy(CONFIG, counters)
    accuracy.begin(0)
    accuracy.truth(0, 0, (0, 1))
    accuracy.proposed(0, [(1, 2), (2, 5)])  # Layer 2 is farther away.
    accuracy.truth(0, 0, (2, 3))
    accuracy.proposed(0, [(1, 2), (1, 4)])  # Expert 2 was proposed before.
    accuracy.truth(0, 1, (4, 2))
    accuracy.truth(0, 1, (4, 2))
    accuracy.truth(0, 2, (5, 0))
    assert counters["candidates"] == counters["candidates_correct"] == 2
    assert counters["demands_predicted"] == 4


def test_layer_0_counts_if_something_was_proposed_for_it():
    counters = Counters()
    accuracy = Accuracy(CONFIG, counters)
    accuracy.begin(1)
    accuracy.proposed(1, [(0, 4), (1, 3)])
    accuracy.truth(1, 0, (4, 5))
    accuracy.begin(1)
    accuracy.truth(1, 0, (4, 5))
    assert counters["candidates"] == counters["candidates_correct"] == 1
    assert counters["demands_predicted"] == 2


def test_token_starts_reach_the_predictor(device, monkeypatch):
    """With its number and phase, the registers' settings, and what it proposes is prefetched."""
    seen = []

    def begin(ctx, token, phase):
        predictor = device.top.predictor
        seen.append((ctx, token, phase, predictor.threshold, predictor.far_threshold))
        seen.append(predictor.ahead)
        return [(ctx, 0, 3, 200, 0, 1)]

    monkeypatch.setattr(device.top.predictor, "begin", begin)
    device("BEGIN_TOKEN", 1, Phase.VERIFY, 0xFFFFFFFF)
    device.write("predict_threshold", 5)
    device.write("predict_far_threshold", 6)
    device.write("predict_ahead", 2)
    device("BEGIN_TOKEN", 0, Phase.DECODE, 77)
    assert seen == [(1, 0xFFFFFFFF, 2, 64, 160), 3, (0, 77, 1, 5, 6), 2]
    assert device.read("candidates") == 2 and device.read("prefetch_issued") == 1


def test_read_gives_the_experts_bytes(device):
    slot = next(f["slot"] for _, f in device("ROUTE", 0, 2, (5, 0)) if f["expert"] == 5)
    answers = device("READ", slot, 30, 2)
    assert [(f["slot"], f["beat"], f["ok"]) for _, f in answers] == [(slot, 30, 1), (slot, 31, 1)]
    data = bytes(b for _, fields in answers for b in fields["data"])
    start = (2 * 6 + 5) * 512 + 30 * 16
    assert data == expert_memory(CONFIG)[start : start + 32].tobytes()


def test_registers(device):
    shape = {"layers": 3, "experts": 6, "top_k": 2, "slots": 6, "contexts": 2, "predictor": 1}
    assert {name: device.read(name) for name in shape} == shape
    assert device.read("device_id") == int.from_bytes(b"PRST", "big")
    assert device.read("version") == VERSION and device.read("register_hash") == register_hash()
    for name, most in (
        ("control", 63),
        ("throttle", 0x0F7F_FFFF),
        ("policy", 2),
        ("hint_threshold", 0xFF),
        ("predict_threshold", 0xFF),
        ("predict_far_threshold", 0xFF),
        ("predict_ahead", 0xFF),
        ("cutoff_layer", 0xFF),
        ("prefetch_tiles", 4),
        ("dma_timeout", 0xFFFFFF),
    ):
        device.write(name, most)
        assert device.read("refusal") == 0
        device.write(name, most + 1)
        assert device.read(name) == most
        register = register_by_name(name).address
        assert device.read("refusal") == 1 << 31 | register << 8 | Refusal.VALUE
        device.write("refusal", 0)
    for register in REGISTERS:
        assert device("REGISTER_READ", register.address)[0][0] == "REGISTER_VALUE"


def test_table_words_advance(device):
    device.write("table_address", 1 << 24)
    device.write("table_data", 5 | 1 << 18)
    device.write("table_data", 4 | 1 << 18)
    assert device.read("table_address") == (1 << 24) + 2
    device.write("table_address", 1 << 24)
    assert [device.read("table_data") & 0xFFFF for _ in range(2)] == [5, 4]
    device.write("table_address", (1 << 24) + 0xFFFFFF)
    device.read("table_data")
    assert device.read("table_address") == 1 << 24


def test_wide_counters_latch_their_high_word(device):
    device.top.counters["demand_bytes"] = (7 << 32) + 5
    assert device.read("demand_bytes_low") == 5
    device.top.counters["demand_bytes"] = 0
    assert device.read("demand_bytes_high") == 7
    device.top.counters["misses"] = (1 << 32) + 3
    assert device.read("misses") == 3  # 32 bits wrap.
    with pytest.raises(ValueError, match="Counter must be one of tokens, .*, not 'nothing'"):
        device.top.counters.register("nothing")


def test_clear(device):
    device("ROUTE", 0, 0, (0, 1))
    device.write("clear", 2)
    assert device("RELEASE", 0, 0) == _event(ErrorCode.UNROUTED)  # The layer was released.
    device("ROUTE", 0, 0, (0, 1))
    assert device.read("misses") == 4  # Nothing was resident.
    device.write("clear", 4)
    assert all(value == 0 for value in device.top.counters.values())
    device.write("clear", 1)
    device.write("table_address", 1 << 24)
    assert device.read("table_data") == 0


def test_sync(device):
    assert device("SYNC", 513) == [("SYNCED", {"tag": 513})]


def test_accuracy_compares_with_the_layer_that_follows():
    counters = Counters()
    accuracy = Accuracy(CONFIG, counters)
    accuracy.begin(0)
    accuracy.truth(0, 0, (0, 1))  # Nothing was proposed for the token's first layer.
    accuracy.proposed(0, [(1, 2), (1, 3), (1, 4)])
    accuracy.truth(1, 1, (2, 3))  # Another context.
    accuracy.truth(0, 1, (3, 5))  # One of two.
    accuracy.proposed(0, [(2, 0)])
    accuracy.begin(0)
    accuracy.truth(0, 2, (0, 1))  # A new token: the proposal was for the old one.
    assert counters["candidates"] == 4
    assert counters["candidates_correct"] == 1
    assert counters["demands_predicted"] == 2


def test_memory_image_is_read_at_the_base():
    memory = np.concatenate([np.zeros(4096, np.uint8), expert_memory(CONFIG)])
    top = Top(CONFIG, memory)
    for name, value in (("expert_base_low", 4096), ("expert_base_high", 0)):
        body = RECORDS["RegisterWrite"].pack(CONFIG, register_by_name(name).address, value)
        top.handle(MESSAGES["REGISTER_WRITE"].code, body)
    top.handle(MESSAGES["ROUTE"].code, RECORDS["Route"].pack(CONFIG, 0, 0, (1, 0)))
    data, ok = top.buffer.read_beat(0, 0)
    assert ok and bytes(data) == expert_memory(CONFIG)[512:528].tobytes()
