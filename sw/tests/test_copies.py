"""A copier in the driver, on the golden model and on devices that misbehave."""

import asyncio
import re
from collections import Counter
from concurrent.futures import Future

import numpy as np
import pytest

import prestage
from prestage.copies import CopyServer
from prestage.device import Device
from prestage.errors import (
    ArgumentError,
    BadFetchedError,
    BusError,
    DeviceTimeoutError,
    LinkError,
    MismatchError,
    OverrunError,
)
from prestage_hw.contract import MESSAGES, RECORDS, DeviceConfig, preset
from prestage_hw.contract.records import HOST_MESSAGES, LINK_ACK, ErrorCode
from prestage_hw.contract.wire import decode_frame, encode_frame
from prestage_sim.model.pipe import ModelPipe, open_pipe
from prestage_sim.model.top import Top
from prestage_tb.coverage import hit

PLAIN = DeviceConfig(model=preset("tiny"), slots=8, expert_bytes=1024, contexts=2)
CONFIG = PLAIN.replace(mover="host")
EMPTY = np.zeros(0, np.uint8)
ERRORS = ("arguments", "reads", "call", "coroutine", "asyncio")


def nothing(*fetch):
    """Copies into slots that nobody looks at."""


def message(name, *values):
    return MESSAGES[name].code, MESSAGES[name].record.pack(CONFIG, *values)


def test_what_goes_together():
    with pytest.raises(ArgumentError, match="mover 'host' must have a copier"):
        prestage.open("model://", config=CONFIG)
    with pytest.raises(ArgumentError, match="must not be given to a device with mover 'dma'"):
        prestage.open("model://", config=PLAIN, copier=nothing)
    with pytest.raises(ArgumentError, match="Memory must not be given where the host"):
        prestage.open("model://", config=CONFIG, copier=nothing, memory=EMPTY)
    with pytest.raises(TypeError, match="Copier must be callable, not 3"):
        prestage.open("model://", config=CONFIG, copier=3)
    # A device is asked what it is.
    pipe = ModelPipe(CONFIG, memory=EMPTY)
    with pytest.raises(MismatchError, match="Register mover must be 0, but the device has 1"):
        Device(pipe, PLAIN)
    pipe.close()
    with pytest.raises(ValueError, match="Mover must be one of dma, host, not 'gpu'"):
        PLAIN.replace(mover="gpu")
    with pytest.raises(ValueError, match="Memory must be empty where the host moves experts"):
        ModelPipe(CONFIG, memory=np.zeros(9, np.uint8))
    with pytest.raises(ValueError, match="Memory must be empty where the host moves experts"):
        open_pipe(CONFIG, memory=EMPTY, options={"error": "0:4"})
    hit("mover.driver_errors", "arguments", of=ERRORS)


def test_sizes():
    """Whole experts may be tiles, whatever their size, but only for a host."""
    size = 13_219_200
    config = CONFIG.replace(expert_bytes=size, tile_bytes=size)
    assert config.tiles == 1
    assert CONFIG.replace(expert_bytes=1 << 30, tile_bytes=1 << 30).tiles == 1
    with pytest.raises(ValueError, match="Tile size in bytes must be between 512 and 16384"):
        PLAIN.replace(expert_bytes=size, tile_bytes=size)
    with pytest.raises(ValueError, match="Expert size must be a whole number"):
        CONFIG.replace(expert_bytes=size, tile_bytes=size - 1)
    calls = []
    with prestage.open(
        "model://", config=config, copier=lambda *fetch: calls.append(fetch)
    ) as device:
        device.configure(prefetch=False)
        device.route(0, 2, [7, 1])
        slots = {ready.expert: ready.slot for ready in device.wait_ready(0, 2)}
        device.release(0, 2)
        assert device.stats()["demand_bytes"] == 2 * size
    assert calls == [(2, expert, slots[expert], 0, size, True) for expert in (7, 1)]


def test_slots_are_the_hosts():
    with prestage.open("model://", config=CONFIG, copier=nothing) as device:
        device.route(0, 0, [1, 2])
        ready, _ = device.wait_ready(0, 0)
        for over_link in (False, True):
            with pytest.raises(ArgumentError, match=f"Slots are the host's: slot {ready.slot}"):
                device.read(ready, over_link=over_link)
        with pytest.raises(OSError, match="slots are the host's"):
            device.simulated.read_slot(0)
        with pytest.raises(OSError, match="slots are the host's"):
            device.simulated.compare([0], [0], [0])
        device._post("READ", 0, 0, 1)
        with pytest.raises(prestage.errors.BadReadError, match="or slots are the host's"):
            device.drain()
    hit("mover.driver_errors", "reads", of=ERRORS)


async def _never():
    pass


@pytest.mark.parametrize("what", ["call", "coroutine", "asyncio"])
def test_copiers_that_are_wrong(what):
    loop = asyncio.new_event_loop()
    results = {
        "call": lambda: device.route(1, 1, [0, 1]),
        "coroutine": _never,
        "asyncio": loop.create_future,
    }
    try:
        with prestage.open(
            "model://", config=CONFIG, copier=lambda *fetch: results[what]()
        ) as device:
            device.configure(prefetch=False)
            device.route(0, 0, [1, 2])
            with pytest.raises(BusError) as caught:
                list(device.wait_ready(0, 0))
    finally:
        loop.close()
    cause = caught.value.__cause__
    if what == "call":
        assert isinstance(cause, ArgumentError) and "must not call the device" in str(cause)
    else:
        assert isinstance(cause, TypeError) and "must return a concurrent.futures" in str(cause)
    hit("mover.driver_errors", what, of=ERRORS)


def test_interrupts_are_not_the_copiers():
    """Ctrl-C in a copier ends the call; the device is told of a failure, and goes on."""
    interrupts = [KeyboardInterrupt()]

    def copier(*fetch):
        if interrupts:
            raise interrupts.pop()

    with prestage.open("model://", config=CONFIG, copier=copier) as device:
        device.configure(prefetch=False)
        device.route(0, 0, [1, 2])
        with pytest.raises(KeyboardInterrupt):
            list(device.wait_ready(0, 0))
        arrived = device.wait_ready(0, 0)
        assert next(arrived).expert == 2
        with pytest.raises(BusError) as caught:
            next(arrived)
        assert isinstance(caught.value.__cause__, KeyboardInterrupt)


def test_prefetches_that_fail_are_only_counted():
    def copier(layer, expert, slot, tile, nbytes, demand):
        if not demand:
            raise OSError

    with prestage.open("model://", config=CONFIG, copier=copier) as device:
        device.configure(hints=True)
        device.hint(0, 1, 4)
        device.drain()
        device.route(0, 1, [4, 5])
        assert len(list(device.wait_ready(0, 1))) == 2
        assert device.counters("fill_errors", "misses", "prefetch_issued") == (1, 2, 1)


def test_device_that_asks_for_what_there_is_not():
    pipe = ModelPipe(CONFIG, memory=EMPTY)
    handle = pipe.top.handle
    bad = message("FETCH", 0, 1, 1, 0, 1, CONFIG.slots, 0)
    device = Device(pipe, CONFIG, copier=nothing)
    pipe.top.handle = lambda code, body: [bad, *handle(code, body)]
    with pytest.raises(LinkError, match="Device asked for a tile that there isn't"):
        device.drain()
    device.close()


@pytest.mark.parametrize(
    ("code", "kind", "text"),
    [
        (ErrorCode.BAD_FETCHED, BadFetchedError, "BAD_FETCHED: entry 3, tile 9"),
        (ErrorCode.OVERRUN, OverrunError, "OVERRUN: type 0x09"),
    ],
)
def test_errors_of_the_device(code, kind, text):
    with prestage.open("model://", config=CONFIG, copier=nothing) as device:
        device._on_event(code, 0, 0, 3, 9)
        with pytest.raises(kind, match=text):
            device.drain()


def test_no_time_out_without_a_clock():
    with prestage.open("model://", config=CONFIG, copier=nothing) as device:
        with pytest.raises(ArgumentError, match="Time-out must be 0 for copies of a device with"):
            device.configure(timeout=1000)
        device.configure(timeout=0)
        hit("mover.driver_errors")


class LateWire:
    """A wire that isn't simulated: what the device says comes some exchanges later."""

    def __init__(self, config, *, late):
        self.model = ModelPipe(config, memory=EMPTY)
        self.late = late
        self.answers = []  # with the exchange in which each comes
        self.now = 0

    def exchange(self, data, *, frames=1, limit=None):
        self.now += 1
        answer = self.model.exchange(data, frames=0)
        if answer and self.late:
            # That the messages have come is heard at once.
            self.answers.append((self.now + self.late, answer))
            *_, acknowledge, _ = decode_frame(answer.split(b"\0")[0])
            return encode_frame(LINK_ACK, sequence=0, acknowledge=acknowledge)
        due = [answer for when, answer in self.answers if when <= self.now]
        self.answers = [each for each in self.answers if each[0] > self.now]
        return b"".join(due) + answer

    def close(self):
        self.model.close()


def test_slow_wires_are_heard_while_a_prefetch_is_copied():
    """What a layer waits for comes late, but before a copy that nobody waits for."""
    never = []

    def copier(layer, expert, slot, tile, nbytes, demand):
        future = Future()
        if demand:
            future.set_result(None)
        else:
            never.append(future)
        return future

    wire = LateWire(CONFIG, late=0)
    with Device(wire, CONFIG, copier=copier) as device:
        device.configure(hints=True, prefetch=False)
        device.hint(0, 2, 5)
        device.flush()
        assert device.copying == 1
        wire.late = 7
        device.route(0, 0, [1, 2])
        assert {ready.expert for ready in device.wait_ready(0, 0)} == {1, 2}
        assert device.copying == 1 and not never[0].done()
        with pytest.raises(DeviceTimeoutError):
            device.route(0, 2, [5, 1])
            list(device.wait_ready(0, 2, timeout=50_000))
        hit("mover.overlap")


def _exchange(pipe, *messages):
    return [answer for code, body in messages for answer in pipe._handle(code, body)]


def test_model_refuses_what_it_did_not_ask_for():
    pipe = ModelPipe(CONFIG, memory=EMPTY)
    pipe.top.scheduler.enable = False
    events = _exchange(pipe, message("FETCHED", 0, 1, 0, 0))
    assert events == [message("EVENT", ErrorCode.BAD_FETCHED, 0, 0, 0, 0)]
    fetches = _exchange(pipe, message("ROUTE", 0, 0, [1, 2]))
    assert [code for code, _ in fetches] == [MESSAGES["FETCH"].code] * 4
    # Everything else waits, up to a limit.
    assert _exchange(pipe, *[message("SYNC", n) for n in range(HOST_MESSAGES)]) == []
    overrun = message("EVENT", ErrorCode.OVERRUN, 0, 0, 0, MESSAGES["SYNC"].code)
    assert _exchange(pipe, message("SYNC", 99)) == [overrun]
    assert _exchange(pipe, message("FETCHED", 0, 2, 1, 0)) == [
        message("EVENT", ErrorCode.BAD_FETCHED, 0, 0, 0, 1)
    ]
    assert _exchange(pipe, message("FETCHED", 0, 1, 1, 0)) == []
    assert _exchange(pipe, message("FETCHED", 0, 1, 1, 0)) == [
        message("EVENT", ErrorCode.BAD_FETCHED, 0, 0, 0, 1)
    ]
    assert pipe.top.counters["rejected"] == 4
    # The link restarts: what is outstanding fails.
    answers = pipe._mover.restart()
    busses = [body for code, body in answers if code == MESSAGES["EVENT"].code]
    assert [body[0] for body in busses] == [ErrorCode.BUS] * 2
    assert sum(code == MESSAGES["SYNCED"].code for code, _ in answers) == HOST_MESSAGES
    pipe.close()
    pipe.close()


def test_model_has_as_many_entries_as_the_device():
    """Decisions of more experts than entries: the rest is asked for as entries become free."""
    config = DeviceConfig(
        model=prestage.ModelConfig(name="wide", layers=2, experts=16, top_k=8),
        slots=16,
        expert_bytes=512,
        inflight=4,
        predictor="none",
        mover="host",
    )
    futures = []

    def copier(*fetch):
        futures.append(Future())
        if len(futures) == 4:
            for future in futures:
                future.set_result(None)
            futures.clear()
            return None
        return futures[-1]

    with prestage.open("model://", config=config, copier=copier) as device:
        device.route(0, 0, range(8))
        assert len(list(device.wait_ready(0, 0))) == 8


def test_golden_top():
    asked = []
    top = Top(CONFIG, lambda fetch: asked.append(fetch) or fetch.expert != 2)
    answers = top.handle(*message("ROUTE", 0, 1, [1, 2]))
    assert [code for code, _ in answers].count(MESSAGES["READY"].code) == 1
    address = CONFIG.expert_address(1, 2)
    assert message("EVENT", ErrorCode.BUS, 0, 1, 2, address) in answers
    assert [fetch[:4] for fetch in asked][:3] == [(1, 1, 0, 0), (1, 1, 0, 1), (1, 2, 1, 0)]
    with pytest.raises(TypeError, match="Memory must be an array of bytes"):
        Top(PLAIN, print)
    with pytest.raises(TypeError, match="Memory must be a callable that copies tiles"):
        Top(CONFIG, EMPTY)
    with pytest.raises(TypeError, match="Copier must be callable, not 3"):
        Top(CONFIG, 3)
    pipe = ModelPipe(CONFIG, memory=EMPTY)

    def broken(code, body):
        raise ZeroDivisionError

    pipe.top.handle = broken
    with pytest.raises(ZeroDivisionError):
        _exchange(pipe, message("SYNC", 1))
    pipe.close()


def test_layers_of_different_sizes():
    """An expert is copied in as many tiles as its layer has, and counted so."""
    sizes = (1800, 600, 1200, 600)
    config = CONFIG.replace(expert_bytes=1800, tile_bytes=600, layer_bytes=sizes)
    calls = Counter()

    def copier(layer, expert, slot, tile, nbytes, demand):
        calls[layer, expert] += 1
        assert tile * 600 + nbytes <= sizes[layer] and nbytes == 600

    with prestage.open("model://", config=config, copier=copier) as device:
        device.configure(prefetch=False)
        for layer, size in enumerate(sizes):
            device.route(0, layer, [1, 6])
            assert len(list(device.wait_ready(0, layer))) == 2
            assert calls[layer, 1] == calls[layer, 6] == size // 600
            device.release(0, layer)
        assert device.stats()["demand_bytes"] == 2 * sum(sizes)
    # A device that asks for more than there is.
    copies = CopyServer(config, copier)
    copies.take(0, 1, 1, 0, 0, 5, 2)
    with pytest.raises(LinkError, match="Device asked for a tile that there isn't"):
        copies.take(0, 1, 1, 1, 0, 5, 1)


WRITTEN = CONFIG.replace(host_writes=True)


def _tile(layer, expert, tile):
    return np.random.default_rng((layer, expert, tile)).bytes(512)


@pytest.mark.parametrize("kind", ["bytes", "array", "future"])
def test_bytes_for_slots_in_the_device(kind):
    """What the copier gives back is what is read; what is no whole tile has failed."""
    wrong = {(1, 2): b"abc", (1, 3): None, (1, 4): 7}

    def copier(layer, expert, slot, tile, nbytes, demand):
        assert nbytes == 512
        result = wrong.get((layer, expert), _tile(layer, expert, tile))
        if kind == "array" and len(result) == 512:
            return np.frombuffer(result, np.uint16)
        if kind == "future":
            future = Future()
            future.set_result(result)
            return future
        return result

    with prestage.open("model://", config=WRITTEN, copier=copier) as device:
        device.configure(prefetch=False)
        for token in range(3):
            device.begin_token(0, token)
            for layer in (0, 3):
                device.route(0, layer, [2 + token, 7])
                for ready in device.wait_ready(0, layer):
                    whole = _tile(layer, ready.expert, 0) + _tile(layer, ready.expert, 1)
                    assert device.read(ready) == whole
                    assert device.read(ready, over_link=True) == whole
                    assert device.simulated.read_slot(ready.slot, size=512) == whole[:512]
                device.release(0, layer)
        with pytest.raises(OSError, match="experts are the host's"):
            device.simulated.compare([0], [0], [0])
        if kind != "array":
            for expert, text in (
                (2, "Tile must be 512 bytes, but the copier returned 3"),
                (3, "Copier must write a tile whole, or return its bytes: tile . of expert 3"),
                (4, "Copier must return a tile's bytes in one piece, a Future or None, not 7"),
            ):
                device.route(0, 1, [expert, 6])
                with pytest.raises(BusError) as caught:
                    for ready in device.wait_ready(0, 1):
                        assert ready.expert == 6
                assert re.search(text, str(caught.value.__cause__))
                device.release(0, 1)
        device.drain()
        # Of the two tiles that were not written the device says so itself.
        stats = device.stats()
        assert stats["rejected"] == (2 if kind != "array" else 0)
        assert stats["writes_refused"] == 0
    hit("mover.driver_writes")


def test_model_refuses_writes_where_nothing_was_asked_for():
    pipe = ModelPipe(WRITTEN, memory=EMPTY)
    pipe.top.scheduler.enable = False
    fetches = _exchange(pipe, message("ROUTE", 0, 0, [1, 2]))
    (_, body), *_ = fetches
    fetch = RECORDS["Fetch"].unpack(WRITTEN, body)
    slot, beats = fetch["slot"], WRITTEN.tile_beats
    good, bad = [7] * 16, [9] * 16
    places = [(slot, at) for at in range(beats)]
    writes = [message("WRITE", *place, good) for place in places]
    early = message("EVENT", ErrorCode.BAD_FETCHED, 0, 0, fetch["tag"], 0)
    fetched = message("FETCHED", fetch["tag"], fetch["serial"], 0, 0)
    assert _exchange(pipe, *writes[:-1], fetched) == [early]
    assert _exchange(pipe, writes[-1], fetched) == []
    # Neither the tile that was reported nor what there is not.
    for place in ((slot, 0), (slot, 2 * beats), (8, 0), (65535, 0xFFFFFFFF), (7, 0)):
        assert _exchange(pipe, message("WRITE", *place, bad)) == []
    assert pipe.top.counters["writes_refused"] == 5
    assert pipe.top.buffer.storage.data[slot, :512].tobytes() == bytes(good * beats)
    # Nor what was open when the link restarted.
    pipe._mover.restart()
    assert _exchange(pipe, message("WRITE", slot, beats, bad)) == []
    assert pipe.top.counters["writes_refused"] == 6
    pipe.close()
    # Others do not know the message.
    pipe = ModelPipe(CONFIG, memory=EMPTY)
    code = MESSAGES["WRITE"].code
    assert _exchange(pipe, message("WRITE", 0, 0, bad)) == [
        message("EVENT", ErrorCode.BAD_MESSAGE, 0, 0, 0, code)
    ]
    pipe.close()
    top = Top(WRITTEN, lambda fetch: True)
    with pytest.raises(ValueError, match="Tile must be written before it is reported"):
        top.handle(*message("ROUTE", 0, 0, [1, 2]))
