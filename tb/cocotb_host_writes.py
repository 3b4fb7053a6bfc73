"""A whole device whose slots the host writes (the half that runs in the simulator).

::

    host ─▶ rx          ┌─────┐
    host ◀─ tx          │     │ ◀─ reads
    host ─▶ host_writes │ Top │ ─▶ beats
                        └─────┘
"""

import random
from collections import Counter

import cocotb
from cocotb.triggers import RisingEdge

from prestage_hw.contract import MESSAGES, RECORDS, encode_frame
from prestage_hw.contract.records import ErrorCode, Phase, Policy
from prestage_hw.contract.registers import register_by_name
from prestage_hw.layouts import RecordLayout
from prestage_sim.model.top import Top as GoldenTop
from prestage_tb.bench import Stall, StreamSink, StreamSource, cycles
from prestage_tb.coverage import hit
from test_top_host import _GoldenHost, _Host, _same_fetches

_READY, _EVENT = MESSAGES["READY"].code, MESSAGES["EVENT"].code


class _Writer(_Host):
    """Host that writes what it copies, through the port or over the link, and a consumer."""

    def __init__(self, dut, *, stall=0.0):
        super().__init__(dut, stall=stall)
        config = self.config

        def source(name, record):
            return StreamSource(dut, name, RecordLayout(record, config=config), stall=stall)

        self.port = source("host_writes", "BufferWrite")
        self.reads = source("reads", "ReadRequest")
        self.beats = StreamSink(dut, "beats", RecordLayout("Beat", config=config), stall=stall)
        self.drivers += [self.port, self.reads, self.beats]

    def clear(self):
        super().clear()
        self.jobs = []  # (writes that were queued by its end, FETCHED) of what the port is to take
        self.queued = 0
        self.times = Counter()  # that each tile was copied
        self.arrived = 0  # experts that were ready

    def take(self, code, body):
        super().take(code, body)
        self.arrived += code == _READY

    def content(self, place):
        """Bytes of a tile as they are copied this time, and what is written of one that fails."""
        # Of an expert that fails the device may ask for more than the model does.
        broken = place[:2] in {at[:2] for at in self.broken}
        rng = random.Random(f"{place} {0 if broken else self.times[place]}")
        data = rng.randbytes(self.config.tile_bytes)
        numbers = rng.sample(range(self.config.tile_beats), self.config.tile_beats)
        if place in self.broken:
            numbers = numbers[: rng.randrange(self.config.tile_beats)]
        return data, numbers

    def beats_of(self, slot, tile, data, numbers=None):
        """BufferWrites of a tile."""
        size, count = self.config.data_bytes, self.config.tile_beats
        for at in range(count) if numbers is None else numbers:
            yield slot, tile * count + at, data[at * size : (at + 1) * size]

    def write(self, *beats):
        """Queue beats at the port."""
        self.port.send(*({"slot": s, "beat": b, "data": d} for s, b, d in beats))
        self.queued += len(beats)

    def copy(self, fetch):
        place = fetch["layer"], fetch["expert"], fetch["tile"]
        data, numbers = self.content(place)
        self.times[place] += 1
        beats = list(self.beats_of(fetch["slot"], fetch["tile"], data, numbers))
        fetched = fetch["tag"], fetch["serial"], fetch["tile"], int(place in self.broken)
        self.slots[fetch["slot"], fetch["tile"]] = place[:2]
        if self.random.random() < 0.3:
            for beat in beats:
                self.post("WRITE", *beat)
        else:
            self.write(*beats)
        # In the order of the fetches: how many bytes of one that fails are counted hangs on it.
        self.jobs.append((self.queued, fetched))

    def report(self):
        """Report what the port has taken."""
        while self.jobs and self.port.sent_count >= self.jobs[0][0]:
            self.post("FETCHED", *self.jobs.pop(0)[1])

    async def step(self, *, serve=True):
        await super().step(serve=serve)
        self.report()

    async def look(self, places):
        """Data and ``ok`` of beats, each a slot and a number, through the consumer port."""
        self.reads.send(*({"slot": slot, "beat": beat} for slot, beat in places))
        beats = await self.beats.receive(len(places))
        return [(bytes(beat["data"]), beat["ok"]) for beat in beats]

    async def compare(self, golden):
        """Every byte of every tile that is valid; that the others are not."""
        places = [
            (slot, beat)
            for slot in range(self.config.slots)
            for beat in range(self.config.expert_beats)
        ]
        compared = 0
        for (slot, beat), (data, ok) in zip(places, await self.look(places), strict=True):
            expected, valid = golden.buffer.read_beat(slot, beat)
            assert ok == valid, (slot, beat)
            assert not ok or data == expected, (slot, beat)
            compared += ok
        return compared

    def stray(self):
        """A write to anywhere, also where there is nothing."""
        config, rng = self.config, self.random
        slot = rng.randrange(rng.choice((config.slots, 1 << config.bits("slot"))))
        beat = rng.randrange(rng.choice((config.expert_beats, 1 << config.bits("beat"))))
        return slot, beat, rng.randbytes(config.data_bytes)

    def far(self):
        """A WRITE whose fields do not fit into the device's."""
        slot, beat, data = self.stray()
        if self.random.random() < 0.5:
            return slot | self.random.randrange(1, 64) << 8, beat, data
        return slot, beat | self.random.randrange(1, 1 << 16) << 16, data


class _GoldenWriter(_GoldenHost):
    """The same bytes in the model's slots."""

    def __init__(self, host):
        super().__init__(host)
        self.golden = None

    def __call__(self, fetch):
        place = fetch.layer, fetch.expert, fetch.tile
        # The device's copy was the same, and was the last one.
        self.host.times[place] -= 1
        data, numbers = self.host.content(place)
        self.host.times[place] += 1
        for beat in self.host.beats_of(fetch.slot, fetch.tile, data, numbers):
            assert self.golden.gate.write(*beat)
        return super().__call__(fetch)


@cocotb.test()
async def drained_pace(dut):
    """At drained pace every byte of every valid tile, every answer and counter is the model's."""
    host = _Writer(dut, stall=Stall(0.3, burst=(1, 6)))
    config, rng, model = host.config, host.random, host.config.model
    copies = _GoldenWriter(host)
    golden = copies.golden = GoldenTop(config, copies)
    await host.reset()
    host.broken = {
        (layer, rng.randrange(model.experts), rng.randrange(config.layer_tiles[layer]))
        for layer in range(model.layers)
    }
    control = 1 | 1 << 1 | 1 << 2 | 1 << 4
    for name, value in (("control", control), ("policy", Policy.LRU)):
        await host.drained(golden, "REGISTER_WRITE", register_by_name(name).address, value)
    compared = 0

    async def check():
        nonlocal compared
        _same_fetches(host, copies)
        # Nothing is open: nothing that is written changes anything.
        for _ in range(rng.randrange(6)):
            beat = host.stray()
            assert not golden.gate.write(*beat)
            host.write(beat) if rng.random() < 0.7 else host.post("WRITE", *beat)
        far = host.far()
        assert not golden.gate.write(*far)
        host.post("WRITE", *far)
        await host.port.sent()
        compared += await host.compare(golden)

    favourites = [rng.sample(range(model.experts), model.top_k) for _ in range(model.layers)]
    for token in range(4):
        ctx = rng.randrange(config.contexts)
        await host.drained(golden, "BEGIN_TOKEN", ctx, Phase.DECODE, token)
        for layer in range(model.layers):
            if rng.random() < 0.6:
                favourites[layer] = rng.sample(range(model.experts), model.top_k)
            if rng.random() < 0.3:
                await host.drained(golden, "HINT", ctx, layer, rng.randrange(model.experts), 255)
            answers = await host.drained(golden, "ROUTE", ctx, layer, favourites[layer])
            await check()
            for code, body in answers:
                if code == _READY and rng.random() < 0.3:
                    slot = RECORDS["Ready"].unpack(config, body)["slot"]
                    count = config.layer_tiles[layer] * config.tile_beats
                    beat = rng.randrange(count)
                    await host.drained(golden, "READ", slot, beat, rng.randrange(1, 9))
                    hit("mover.writes_read")
            await host.drained(golden, "RELEASE", ctx, layer)
            await check()
    assert golden.counters["fills"] > 10 and golden.counters["prefetch_issued"] > 2
    assert golden.counters["fill_errors"] and golden.counters["writes_refused"] > 50
    assert compared > 20 * config.expert_beats
    await host.compare_registers(golden)
    hit("mover.writes")
    hit("mover.bad_writes")


@cocotb.test()
async def any_order(dut):
    """Beats of all tiles that are open, and of others, in any order, while experts are read."""
    host = _Writer(dut, stall=0.2)
    config, rng, model = host.config, host.random, host.config.model
    await host.reset()
    host.post("REGISTER_WRITE", register_by_name("prefetch_tiles").address, 3)
    host.post("REGISTER_WRITE", register_by_name("control").address, 1 | 1 << 4)
    layers = [0] * config.contexts
    held = {}  # (ctx, layer): experts that are awaited, slots of those that came
    leaving = set()  # of them, those that are read no more
    written = {}  # (slot, beat): data
    looked = []  # what beats that were asked for must be
    bad = answered = checked = 0
    open_tiles = []  # [fetch, beats that are left, over the link, writes queued after the last]
    for step in range(10_000):
        await RisingEdge(dut.clk)
        host.poll()
        for fetch in host.asked:
            data = rng.randbytes(config.tile_bytes)
            beats = list(host.beats_of(fetch["slot"], fetch["tile"], data))
            rng.shuffle(beats)
            open_tiles.append([fetch, beats, rng.random() < 0.06, 0])
            written.update({beat[:2]: beat[2] for beat in beats})
            host.slots[fetch["slot"], fetch["tile"]] = fetch["layer"], fetch["expert"]
        host.asked.clear()
        ready = [key for key, (_, there) in held.items() if there and key not in leaving]
        for _, (_, there) in held.items():
            if there and host.port.pending < 4 and rng.random() < 0.05:
                slot = rng.choice(there)
                host.write((slot, rng.randrange(config.expert_beats), rng.randbytes(16)))
                bad += 1
        if host.port.pending < 4 and rng.random() < 0.05:
            slot, beat, data = host.stray()
            if slot >= config.slots or beat >= config.expert_beats:
                host.write((slot, beat, data))
                bad += 1
        for tile in rng.sample(open_tiles, len(open_tiles)):
            fetch, beats, over_link, queued = tile
            if beats and over_link and host.rx.pending < 60:
                host.post("WRITE", *beats.pop())
            elif beats and not over_link and host.port.pending < 4:
                for _ in range(rng.choice((1, 1, 8))):
                    if beats:
                        host.write(beats.pop())
                tile[3] = host.queued
            elif not beats and host.port.sent_count >= queued and rng.random() < 0.2:
                host.post("FETCHED", fetch["tag"], fetch["serial"], fetch["tile"], 0)
                open_tiles.remove(tile)
        for code, body in host.answers:
            assert code == _READY, RECORDS["Event"].unpack(config, body)
            fields = RECORDS["Ready"].unpack(config, body)
            awaited, there = held[fields["ctx"], fields["layer"]]
            awaited.remove(fields["expert"])
            there.append(fields["slot"])
            answered += 1
        host.answers.clear()
        if ready and host.reads.pending < 4:
            key = rng.choice(ready)
            slot = rng.choice(held[key][1])
            beat = rng.randrange(config.layer_tiles[key[1]] * config.tile_beats)
            host.reads.send({"slot": slot, "beat": beat})
            looked.append((slot, beat, written[slot, beat]))
        while looked and checked < len(host.beats.received):
            beat = host.beats.received[checked]
            checked += 1
            assert (bytes(beat["data"]), beat["ok"]) == (looked[0][2], 1), looked[0]
            looked.pop(0)
        busy = {slot for slot, _, _ in looked}
        leaving |= {k for k, (awaited, _) in held.items() if not awaited and rng.random() < 0.02}
        for key in [key for key in leaving if not busy & set(held[key][1])]:
            host.post("RELEASE", *key)
            leaving.remove(key)
            del held[key]
        ctx = rng.randrange(config.contexts)
        if step < 9000 and rng.random() < 0.02 and not any(key[0] == ctx for key in held):
            layer = layers[ctx]
            if layer == 0:
                host.post("BEGIN_TOKEN", ctx, Phase.DECODE, rng.randrange(50))
            experts = rng.sample(range(model.experts), model.top_k)
            host.post("ROUTE", ctx, layer, experts)
            held[ctx, layer] = set(experts), []
            layers[ctx] = (layer + 1) % model.layers
    assert answered > 20 and checked > 1000 and bad > 30, (answered, checked, bad)
    await host.port.sent()
    host.post("SYNC", 2)
    while open_tiles:
        fetch, beats, *_ = open_tiles.pop()
        host.write(*beats)
        host.jobs.append((host.queued, (fetch["tag"], fetch["serial"], fetch["tile"], 0)))
    await host.wait(MESSAGES["SYNCED"].code)
    assert await host.read("writes_refused") == bad
    assert await host.read("rejected") == await host.read("fill_errors") == 0
    hit("mover.writes_any_order")


@cocotb.test()
async def early(dut):
    """A tile counts as copied only once all its beats were taken, and takes none afterwards."""
    host = _Writer(dut)
    config, rng, model = host.config, host.random, host.config.model
    await host.reset()
    host.post("REGISTER_WRITE", register_by_name("control").address, 0)
    refused = 0
    layer = max(range(model.layers), key=lambda at: config.layer_tiles[at])
    tiles = config.layer_tiles[layer]

    async def fetches(experts):
        host.fetches.clear()
        host.answers.clear()
        host.arrived = 0
        # All of them are to be fetched.
        host.post("REGISTER_WRITE", register_by_name("clear").address, 2)
        host.post("ROUTE", 0, layer, experts)
        while len(host.fetches) < model.top_k * tiles:
            await host.step(serve=False)
        host.asked.clear()
        return sorted(host.fetches, key=lambda f: (f["expert"], f["tile"]))

    async def rest(fetches):
        """Copy them as usual, and give the layer back."""
        host.asked.extend(fetches)
        await host.step()
        while host.jobs:
            await host.step()
        await host.rx.sent()
        await cycles(dut, 100)

    # One beat is missing, through the port or over the link.
    for round_, over_link in enumerate((False, True, False)):
        first, *others = await fetches(rng.sample(range(model.experts), model.top_k))
        await rest(others)
        fields = first["tag"], first["serial"], first["tile"]
        data = rng.randbytes(config.tile_bytes)
        beats = list(host.beats_of(first["slot"], first["tile"], data))
        host.slots[first["slot"], first["tile"]] = layer, first["expert"]
        rng.shuffle(beats)
        for beat in beats[1:]:
            host.post("WRITE", *beat) if over_link else host.write(beat)
        await host.port.sent()
        await host.refused(*fields)
        assert (await host.look([beats[1][:2]]))[0][1] == 0, "not valid yet"
        if round_ == 2:
            # A tile that could not be copied need not be whole.
            host.post("FETCHED", *fields, 1)
            *_, (_, body) = await host.wait(_EVENT)
            assert RECORDS["Event"].unpack(config, body)["code"] == ErrorCode.BUS
            break
        host.post("WRITE", *beats[0]) if over_link else host.write(beats[0])
        await host.port.sent()
        host.post("FETCHED", *fields, 0)
        # It takes nothing more. The same bytes over the link wait for nothing but the FETCHED.
        for slot, beat, _ in beats[:4]:
            host.post("WRITE", slot, beat, rng.randbytes(config.data_bytes))
            refused += 1
        while host.arrived < model.top_k:
            await host.step(serve=False)
        assert all(code == _READY for code, _ in host.answers)
        for beat in beats[4:8]:
            host.write((*beat[:2], rng.randbytes(config.data_bytes)))
            refused += 1
        await host.port.sent()
        await cycles(dut, 20)
        assert await host.look([b[:2] for b in beats]) == [(b[2], 1) for b in beats]
        host.post("RELEASE", 0, layer)
    host.post("RELEASE", 0, layer)
    host.post("SYNC", 1)
    await host.wait(MESSAGES["SYNCED"].code)
    assert await host.read("writes_refused") == refused
    hit("mover.unwritten")

    # A tile is readable, and closed, while others of its expert are still open.
    first, second, *others = await fetches(rng.sample(range(model.experts), model.top_k))
    await rest([first, *others])
    data, numbers = rng.randbytes(config.tile_bytes), range(config.tile_beats)
    host.write(*host.beats_of(first["slot"], first["tile"], data))
    refused += config.tile_beats
    places = [[(f["slot"], f["tile"] * config.tile_beats + at) for at in numbers]
              for f in (first, second)]  # fmt: skip
    await host.port.sent()
    assert all(ok for _, ok in await host.look(places[0]))
    assert not any(ok for _, ok in await host.look(places[1]))
    # The last byte of the FETCHED comes in the cycle after the last beat, whose tile has just
    # changed.
    host.post("SYNC", 9)
    await host.rx.sent()
    beats = list(host.beats_of(second["slot"], second["tile"], data))
    stray = first["slot"], first["tile"] * config.tile_beats, data[: config.data_bytes]
    body = RECORDS["Fetched"].pack(config, second["tag"], second["serial"], second["tile"], 0)
    frame = encode_frame(
        MESSAGES["FETCHED"].code, sequence=host.sequence, acknowledge=host.expected, body=body
    )
    host.sequence += 1
    host.slots[second["slot"], second["tile"]] = layer, second["expert"]
    host.rx.send(*frame[:-1])
    await host.rx.sent()
    host.write(*beats[:-1], stray, beats[-1])
    refused += 1
    await host.port.sent()
    host.rx.send(frame[-1])
    answers = await host.wait(MESSAGES["SYNCED"].code)
    assert not any(code == _EVENT for code, _ in answers)
    assert await host.look(places[1]) == [(b[2], 1) for b in beats]
    host.post("RELEASE", 0, layer)
    hit("mover.write_order")

    # A restart of the link closes what was open.
    await host.rx.sent()
    fetched = await fetches(rng.sample(range(model.experts), model.top_k))
    await host.rx.sent()
    host.restart()
    done = host.resets_done
    while host.resets_done == done:
        await cycles(dut, 4)
        host.poll()
    host.answers.clear()
    host.post("SYNC", 10)
    await host.wait(MESSAGES["SYNCED"].code)
    for fetch in fetched:
        host.write(*host.beats_of(fetch["slot"], fetch["tile"], data, numbers[:2]))
        refused += 2
    await host.port.sent()
    assert await host.read("writes_refused") == refused
    host.post("RELEASE", 0, layer)
    host.asked.clear()
    # And the new host is served.
    host.post("ROUTE", 0, layer, rng.sample(range(model.experts), model.top_k))
    for _ in range(model.top_k):
        await host.wait(_READY)
    hit("mover.writes_restart")
