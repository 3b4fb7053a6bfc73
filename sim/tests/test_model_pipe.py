"""The golden model behind its byte streams."""

import contextlib

import numpy as np
import pytest

from prestage_hw.contract import (
    MESSAGES,
    RECORDS,
    DeviceConfig,
    SimulatedPipe,
    decode_frame,
    encode_frame,
    preset,
)
from prestage_hw.contract.pattern import expert_memory
from prestage_sim.model.pipe import ModelPipe, open_pipe

CONFIG = DeviceConfig(model=preset("tiny"), slots=8, expert_bytes=1024)


@pytest.fixture
def pipe():
    return open_pipe(CONFIG, memory=expert_memory(CONFIG), options={})


def route(sequence, *, layer=0, experts=(3, 5)):
    message = MESSAGES["ROUTE"]
    body = message.record.pack(CONFIG, 0, layer, experts)
    return encode_frame(message.code, sequence=sequence, acknowledge=0, body=body)


def frames(data):
    return [decode_frame(part) for part in data.split(b"\0") if part]


def ready_slots(data):
    record = RECORDS["Ready"]
    return {
        fields["expert"]: fields["slot"]
        for code, _, _, body in frames(data)
        if code == MESSAGES["READY"].code
        for fields in [record.unpack(CONFIG, body)]
    }


def test_is_a_simulated_pipe(pipe):
    assert isinstance(pipe, SimulatedPipe)
    assert not pipe.clocked
    assert pipe.cycles == 0
    assert len(pipe.transfers()) == 0


def test_bytes_come_from_memory(pipe):
    slots = ready_slots(pipe.exchange(route(0)))
    assert set(slots) == {3, 5}
    memory = expert_memory(CONFIG)
    for expert, slot in slots.items():
        start = CONFIG.expert_address(0, expert)
        assert pipe.read_slot(slot) == memory[start : start + 1024].tobytes()
    assert pipe.compare([slots[3], slots[5]], [0, 0], [3, 5]) == []
    assert pipe.compare([slots[3], slots[5]], [0, 0], [3, 4]) == [1]
    free = next(slot for slot in range(8) if pipe.top.buffer.storage.valid[slot] == 0)
    assert pipe.compare([free], [0], [3]) == [0]
    with pytest.raises(OSError, match=f"tile 0 of slot {free} is not valid"):
        pipe.read_slot(free)
    with pytest.raises(ValueError, match="Slot must be between 0 and 7, not 8"):
        pipe.read_slot(8)


def test_slots_that_are_longer_than_their_expert():
    config = CONFIG.replace(layer_bytes=(512, 1024, 1024, 1024))
    memory = expert_memory(config)
    with contextlib.closing(ModelPipe(config, memory=memory)) as pipe:
        slot = ready_slots(pipe.exchange(route(0)))[3]
        start = config.expert_address(0, 3)
        assert pipe.read_slot(slot, size=512) == memory[start : start + 512].tobytes()
        assert pipe.compare([slot], [0], [3]) == []
        assert pipe.compare([slot, slot], [0, 1], [4, 3]) == [0, 1]
        with pytest.raises(OSError, match=f"tile 1 of slot {slot} is not valid"):
            pipe.read_slot(slot)
        for size in (0, 513, 1536):
            text = "Size must be a whole number of 512-byte tiles, at most 1024 bytes, not"
            with pytest.raises(ValueError, match=f"{text} {size}"):
                pipe.read_slot(slot, size=size)


def test_silence_repeats_what_was_not_acknowledged(pipe):
    first = pipe.exchange(route(0))
    assert pipe.exchange(b"", frames=0) == b""
    again = pipe.exchange(b"", frames=1)
    assert [f[0] for f in frames(again)] == [f[0] for f in frames(first)]
    assert pipe.top.counters["link_replays"] == 1
    assert pipe.run(100) == b""


def test_damage_is_counted(pipe):
    frame = bytearray(route(0))
    frame[3] ^= 0x10
    answer = pipe.exchange(bytes(frame))
    assert [f[0] for f in frames(answer)] == [MESSAGES["LINK_NAK"].code]
    assert pipe.top.counters["link_errors"] == 1


def test_closed(pipe):
    pipe.close()
    pipe.close()
    with pytest.raises(OSError, match="was closed"):
        pipe.exchange(b"")


def test_options():
    memory = expert_memory(CONFIG)
    address = CONFIG.expert_address(0, 3)
    pipe = open_pipe(CONFIG, memory=memory, options={"error": f"{address:#x}:1,0x7000:16"})
    assert set(ready_slots(pipe.exchange(route(0)))) == {5}
    with pytest.raises(ValueError, match="Option of model:// must be error, not 'latency'"):
        open_pipe(CONFIG, memory=memory, options={"latency": "3"})
    for text in ("5", "5:0", "-1:3", "x:3"):
        with pytest.raises(ValueError, match="Error range must be ADDRESS:SIZE"):
            open_pipe(CONFIG, memory=memory, options={"error": text})


def test_parameters():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig"):
        ModelPipe("tiny", memory=np.zeros(8, np.uint8))
    with pytest.raises(TypeError, match="one-dimensional array of uint8"):
        ModelPipe(CONFIG, memory=np.zeros(8))
