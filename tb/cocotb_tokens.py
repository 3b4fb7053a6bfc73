"""Token tables against a dictionary; run by ``test_tokens.py``.

::

    commands, choices_in ─▶ table (─▶ memory) ─▶ found
    table_requests ────────▶    ▲ clear     └──▶ table_values

The dictionary follows the commands in their order: an entry keeps its tag, and the stored sets of
each layer, as they lie in memory.
"""

import random

import cocotb
from cocotb.triggers import FallingEdge, RisingEdge

from prestage_hw.predictor.tokens import (
    KEPT,
    TABLES,
    CommandLayout,
    FoundLayout,
    StoredSetLayout,
    TableAccessLayout,
    TokenTable,
    table_rows,
)
from prestage_hw.predictor.tokens_memory import (
    MemoryCommandLayout,
    MemoryFoundLayout,
    TokenMemory,
)
from prestage_tb.axi import DECERR, SLVERR, AXIWritableMemory, pattern
from prestage_tb.bench import (
    Signals,
    Stall,
    StreamSink,
    StreamSource,
    assert_no_x,
    cycles,
    parameters,
    reset,
    start_clock,
)


class TokensBench:
    """Drivers of all ports, and a dictionary that does the same."""

    def __init__(self, dut, stall=0.0, data=pattern):
        self.dut = dut
        self.ports = Signals(dut)
        values = parameters()
        self.config = config = values["config"]
        self.in_memory = values["memory"]
        self.random = random.Random(cocotb.RANDOM_SEED)
        self.layers, self.top_k = config.model.layers, config.model.top_k
        self.bits = config.bits("expert")
        self.set_bits = self.top_k * self.bits + 1
        start_clock(dut)
        dut.clear.value = 0
        stored = StoredSetLayout(config)
        if self.in_memory:
            self.rows = {TABLES.index(name): rows for name, rows in table_rows(config).items()}
            self.choices = {n: len(KEPT[TABLES[n]]) for n in self.rows}
            command, found = MemoryCommandLayout(config), MemoryFoundLayout(config)
            dut.base.value = 0x3000 | self.random.getrandbits(12)
            self.memory = AXIWritableMemory(
                dut,
                data=data,
                data_bytes=config.data_bytes,
                address_bits=config.address_bits,
                latency=7,
                burst_beats=config.burst_beats,
                outstanding=1,
                address_stall=stall,
                data_stall=stall,
            )
        else:
            self.rows, self.choices = {0: values["rows"]}, {0: values["choices"]}
            command = CommandLayout(values["rows"])
            found = FoundLayout(config, choices=values["choices"])
            access = TableAccessLayout()
            self.requests = StreamSource(dut, "table_requests", access, stall=stall)
            self.values = StreamSink(dut, "table_values", 32, stall=stall)
        self.commands = StreamSource(dut, "commands", command, stall=stall)
        self.choices_in = StreamSource(dut, "choices_in", stored, stall=stall)
        self.found = StreamSink(dut, "found", found, stall=stall)
        self.drivers = [self.commands, self.choices_in, self.found]
        if not self.in_memory:
            self.drivers += [self.requests, self.values]
        self.forget()
        cocotb.start_soon(self._watch())

    def forget(self):
        """Start an empty dictionary."""
        self.tags = {table: {} for table in self.rows}
        self.words = {table: {} for table in self.rows}  # (entry, layer): stored sets
        self.expected = []
        self.expected_values = []
        self.errors = self.bus_errors = 0

    async def start(self):
        await reset(self.dut, drivers=self.drivers)
        self.forget()

    async def _watch(self):
        while True:
            await FallingEdge(self.dut.clk)
            self.errors += self.ports.high("parity_errors")
            if self.in_memory:
                self.bus_errors += self.ports.high("bus_errors")
            if self.ports.high("idle") and self.ports.bits("rst") == "0":
                assert self.ports.bits("found__valid") == "0"

    # --- sets as {experts, valid, parity}

    def random_set(self, unknown=0.2):
        experts = self.random.sample(range(self.config.model.experts), self.top_k)
        valid = int(self.random.random() >= unknown)
        return self.make_set(experts if valid else [0] * self.top_k, valid)

    def make_set(self, experts, valid):
        ones = sum(e.bit_count() for e in experts) + valid
        return {"experts": list(experts), "valid": valid, "parity": ones & 1}

    @property
    def unknown(self):
        return self.make_set([0] * self.top_k, 0)

    def pack(self, stored):
        """Bits of a set without its parity; 0 if that is wrong."""
        word = sum(e << at * self.bits for at, e in enumerate(stored["experts"]))
        word |= stored["valid"] << self.top_k * self.bits
        return 0 if (word.bit_count() + stored["parity"]) & 1 else word

    def unpack(self, word):
        mask = (1 << self.bits) - 1
        experts = [word >> at * self.bits & mask for at in range(self.top_k)]
        return self.make_set(experts, word >> self.top_k * self.bits & 1)

    # --- commands

    def sets_at(self, table, entry, layer):
        return self.words[table].get((entry, layer), [self.unknown] * self.choices[table])

    def _send(self, table, store, entry, tag):
        payload = {"store": store, "entry": entry, "tag": tag}
        self.commands.send({**payload, "table": table} if self.in_memory else payload)

    def store(self, table, entry, tag, failed=False):
        """Store random sets; ``failed`` if the entry can't be read."""
        self._send(table, 1, entry, tag)
        match = self.tags[table].get(entry) == tag and not failed
        for layer in range(self.layers):
            new = self.random_set()
            self.choices_in.send(new)
            old = self.sets_at(table, entry, layer)[0]
            exists = max(old["experts"]) < self.config.model.experts
            kept = old if match and old["valid"] and (exists or self.in_memory) else self.unknown
            self.words[table][entry, layer] = [new, kept][: self.choices[table]]
        self.tags[table][entry] = tag

    def find(self, table, entry, tag, failed=False):
        """Look an entry up; with ``failed`` a read fails, which takes back what was found."""
        self._send(table, 0, entry, tag)
        if self.tags[table].get(entry) == tag and not failed:
            for layer in range(self.layers):
                self.expect(table, layer, self.sets_at(table, entry, layer))

    def expect(self, table, layer, sets):
        if self.in_memory:
            nothing = [self.unknown] * (2 - len(sets))
            self.expected.append({"table": table, "layer": layer, "sets": sets + nothing})
        else:
            self.expected.append({"layer": layer, "sets": sets})

    def step(self):
        """A random command, mostly for few entries and tags."""
        table = self.random.choice(list(self.rows))
        entry = self.random.choice((0, 0, 1, 2, self.rows[table] - 1))
        tag = self.random.choice((0, 1, 1, 0x8001, 0xFFFF))
        (self.store if self.random.random() < 0.4 else self.find)(table, entry, tag)

    async def until_idle(self, limit=200_000):
        for driver in (self.commands, self.choices_in):
            await driver.sent()
        if not self.in_memory:
            await self.requests.sent()
        for _ in range(limit):
            await FallingEdge(self.dut.clk)
            if self.ports.high("idle"):
                break
        else:
            raise AssertionError(f"Table must become idle within {limit} cycles")
        await RisingEdge(self.dut.clk)

    async def compare(self):
        await self.until_idle()
        assert len(self.found.received) == len(self.expected)
        for got, wanted in zip(self.found.received, self.expected, strict=True):
            if self.in_memory and self.choices[got["table"]] == 1:
                got = {**got, "sets": [got["sets"][0], self.unknown]}
            assert got == wanted
        if not self.in_memory:
            assert self.values.received == self.expected_values

    async def clear(self):
        self.dut.clear.value = 1
        await RisingEdge(self.dut.clk)
        self.dut.clear.value = 0
        self.tags = {table: {} for table in self.rows}
        self.words = {table: {} for table in self.rows}

    # --- table port

    @property
    def chunks(self):
        return -(-self.choices[0] * self.set_bits // 32)

    def word_bits(self, entry, layer):
        sets = self.sets_at(0, entry, layer)
        return sum(self.pack(stored) << n * self.set_bits for n, stored in enumerate(sets))

    def access(self, word, value=None):
        """Read or write a table word."""
        payload = {"table": 0, "word": word, "write": int(value is not None)}
        self.requests.send({**payload, "value": value or 0})
        rows = self.rows[0]
        index, chunk = divmod(max(word - rows, 0), self.chunks)
        entry, layer = divmod(index, self.layers)
        if value is None:
            result = 0
            if word < rows:
                tag = self.tags[0].get(word)
                result = 0 if tag is None else tag & 0xFFFF | (tag >= 0) << 16
            elif entry < rows:
                result = self.word_bits(entry, layer) >> 32 * chunk & 0xFFFFFFFF
            self.expected_values.append(result)
        elif word < rows:
            # Tags that are not valid are kept as negative numbers.
            self.tags[0][word] = value & 0xFFFF if value >> 16 & 1 else (value & 0xFFFF) - 0x10000
        elif entry < rows:
            bits = self.word_bits(entry, layer)
            bits = bits & ~(0xFFFFFFFF << 32 * chunk) | value << 32 * chunk
            self.words[0][entry, layer] = [
                self.unpack(bits >> n * self.set_bits & ((1 << self.set_bits) - 1))
                for n in range(self.choices[0])
            ]

    def read_all(self):
        words = self.rows[0] * (1 + self.layers * self.chunks)
        for word in (*range(words), words, (1 << 24) - 1):
            self.access(word)


@cocotb.test()
async def follows_golden(dut):
    """Random commands without and with stalls."""
    bench = TokensBench(dut)
    await bench.start()
    for stall in (0.0, 0.4, Stall(0.7, burst=(1, 40))):
        for driver in bench.drivers:
            driver.stall = stall
        for _ in range(80):
            bench.step()
        await bench.until_idle()
    await bench.compare()
    assert bench.expected
    if not bench.in_memory:
        bench.read_all()
        await bench.compare()
        assert not bench.errors
    assert_no_x(dut.idle, dut.parity_errors)


@cocotb.test()
async def keeps_loaded_words(dut):
    """Any words through the table port: they are read back, and commands go on from them."""
    bench = TokensBench(dut, stall=0.2)
    await bench.start()
    table = TokenTable(bench.config, rows=bench.rows[0], choices=bench.choices[0])
    assert table.table_words == bench.rows[0] * (1 + bench.layers * bench.chunks)
    for _ in range(3 if table.table_words < 1000 else 1):
        for word in range(table.table_words):
            if bench.random.random() < 0.8:
                value = bench.random.getrandbits(32)
                if word < bench.rows[0]:
                    value = bench.random.choice((0x10001, 0x10000, 1, 0x1FFFF, value))
                bench.access(word, value)
        bench.access(table.table_words, 0xFFFFFFFF)
        bench.access((1 << 24) - 1, 0xFFFFFFFF)
        await bench.until_idle()
        bench.read_all()
        await bench.compare()
        for _ in range(30):
            bench.step()
        await bench.compare()
    assert not bench.errors


@cocotb.test()
async def clears_in_mid_run(dut):
    """A clear waits for what was accepted, then forgets everything."""
    bench = TokensBench(dut, stall=0.2)
    await bench.start()
    for _ in range(8):
        for _ in range(6):
            bench.step()
        await bench.commands.sent()
        await cycles(dut, bench.random.randrange(30))
        await bench.clear()
        bench.step()
        await bench.compare()
    await bench.clear()
    for table in bench.rows:
        for entry in range(bench.rows[table]):
            for tag in (0, 1, 0xFFFF):
                bench.find(table, entry, tag)
    await bench.compare()


@cocotb.test()
async def restarts_in_mid_flight(dut):
    """Reset at any moment: everything under way is dropped and nothing is found."""
    bench = TokensBench(dut)
    await bench.start()
    for _ in range(12):
        for _ in range(20):
            bench.step()
        await cycles(dut, bench.random.randrange(5, 250))
        await bench.start()
        assert not bench.found.received
        for table in bench.rows:
            for entry in (0, 1, 2, bench.rows[table] - 1):
                for tag in (0, 1, 0x8001, 0xFFFF):
                    bench.find(table, entry, tag)
        await bench.compare()
    for _ in range(20):
        bench.step()
    await bench.compare()


@cocotb.test()
async def is_as_fast_as_promised(dut):
    """Cycles of each command on a free table without stalls."""
    bench = TokensBench(dut)
    await bench.start()
    await bench.until_idle()
    for table in bench.rows:

        async def measure(command, *arguments):
            while bench.commands.pending:
                await RisingEdge(dut.clk)
            command(*arguments)
            await bench.commands.sent()
            start = bench.commands.cycle
            await bench.until_idle()
            return bench.commands.cycle - start

        taken = [
            await measure(bench.store, table, 1, 5),
            await measure(bench.find, table, 1, 5),
            await measure(bench.find, table, 1, 6),
        ]
        dut._log.info(f"cycles of storing, finding, missing {taken} of table {table}")
        if not bench.in_memory:
            component = TokenTable(bench.config, rows=8, choices=bench.choices[0])
            bounds = [component.store_cycles, component.find_cycles, component.miss_cycles]
            assert taken == bounds
        else:
            # One beat a cycle is read, a layer takes a cycle more to be written.
            region = TokenMemory(bench.config).regions[TABLES[table]]
            bursts = len(bench.memory.transfers) // 2
            assert taken[1] <= region.beats + 12 + 12 * bursts
    await bench.compare()


@cocotb.test()
async def takes_errors_for_misses(dut):
    """Reads that fail at any beat match nothing; writes that fail change nothing."""
    size = parameters()["config"].data_bytes
    bench = TokensBench(dut, data=lambda address, count: bytes(count))
    await bench.start()
    unknown = [bench.unknown] * 2
    for round_number in range(24):
        for table, rows in bench.rows.items():
            region = bench.memory and TokenMemory(bench.config).regions[TABLES[table]]
            entry = bench.random.randrange(rows)
            bench.store(table, entry, 7)
            bench.find(table, entry, 7)
            await bench.compare()
            first = 0x3000 + region.offset + entry * region.stride
            beat = bench.random.randrange(region.beats)
            address = first + beat * size
            code = bench.random.choice((SLVERR, DECERR))
            told = bench.bus_errors
            if round_number % 3 == 0:
                # A look-up: what was found before the error comes again as unknown.
                bench.memory.failing = [(address, address + size, code)]
                before = len(bench.found.received)
                bench.find(table, entry, 7, failed=True)
                await bench.until_idle()
                came = bench.found.received[before:]
                assert [f["layer"] for f in came][-bench.layers :] == (
                    list(range(bench.layers)) if came else []
                )
                assert all(f["sets"] == unknown for f in came[-bench.layers :])
                given = region.beats - (bench.layers - 1) * region.set_beats - 1
                assert bool(came) == (beat >= given)
                bench.expected = list(bench.found.received)
                await bench.compare()
                bench.memory.failing = []
            elif round_number % 3 == 1:
                bench.memory.failing = [(address, address + size, code)]
                bench.store(table, entry, 7, failed=region.choices == 2)
                await bench.until_idle()
                bench.memory.failing = []
                if region.choices == 1:
                    told -= 1  # Nothing was read.
            else:
                kept = dict(bench.tags[table]), dict(bench.words[table])
                bench.memory.failing_writes = [(first, first + region.stride, code)]
                bench.store(table, entry, 9)
                await bench.until_idle()
                bench.memory.failing_writes = []
                bench.tags[table], bench.words[table] = kept
            assert bench.bus_errors > told
            bench.find(table, entry, 7)
            await bench.compare()
    assert not bench.errors


@cocotb.test()
async def forgets_words_of_bad_parity(dut):
    """A flipped bit in a tag matches nothing and is told; one in a set comes as it is."""
    bench = TokensBench(dut, data=lambda address, count: bytes(count))
    await bench.start()
    size = parameters()["config"].data_bytes
    for _ in range(20):
        for table, rows in bench.rows.items():
            entry = bench.random.randrange(rows)
            bench.store(table, entry, 3)
            bench.store(table, entry, 3)
            bench.find(table, entry, 3)
            await bench.compare()
            assert not bench.errors
            # A set, which keeps its wrong parity also when it becomes the older one.
            layer, choice = bench.random.randrange(bench.layers), bench.choices[table] - 1
            bit = bench.random.randrange(bench.set_bits + 1)
            at = choice * (bench.set_bits + 1) + bit
            region = first = None
            if bench.in_memory:
                region = TokenMemory(bench.config).regions[TABLES[table]]
                first = 0x3000 + region.offset + entry * region.stride
                head = region.beats - bench.layers * region.set_beats
                beat = head + layer * region.set_beats + at // (8 * size)
                bench.memory.words[first + beat * size] ^= 1 << at % (8 * size)
            else:
                word = dut.row_words0[entry * bench.layers + layer]
                word.value = int(word.value) ^ 1 << at
            sets = [dict(stored) for stored in bench.sets_at(table, entry, layer)]
            bad = sets[choice] = {**sets[choice], "experts": list(sets[choice]["experts"])}
            if bit < bench.set_bits - 1:
                bad["experts"][bit // bench.bits] ^= 1 << bit % bench.bits
            else:
                bad["valid" if bit == bench.set_bits - 1 else "parity"] ^= 1
            bench.words[table][entry, layer] = sets
            await RisingEdge(dut.clk)
            bench.find(table, entry, 3)
            if not bench.in_memory:
                bench.read_all()
                await bench.compare()
                assert bench.errors == bench.chunks
            await bench.compare()
            bench.errors = 0
            # The tag.
            bit = bench.random.randrange(33 if bench.in_memory else 18)
            if bench.in_memory:
                bench.memory.words[first + bit // (8 * size) * size] ^= 1 << bit % (8 * size)
            else:
                dut.tags[entry].value = int(dut.tags[entry].value) ^ 1 << bit
            del bench.tags[table][entry]
            await RisingEdge(dut.clk)
            for tag in (3, 2, 1, 7):
                bench.find(table, entry, tag)
            await bench.compare()
            assert bench.errors == 4
            bench.store(table, entry, 3)
            await bench.compare()
            bench.errors = 0
            bench.find(table, entry, 3)
            if not bench.in_memory:
                bench.read_all()
            await bench.compare()
            assert not bench.errors
