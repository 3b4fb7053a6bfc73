"""Token tables in block RAM: what was routed when a token was last seen."""

from amaranth import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.checks import require_integer, require_power_of_two
from prestage_hw.contract.params import require_config

from .sets import SetLayout
from .two_beats import TwoBeats

__all__ = [
    "KEPT",
    "TABLES",
    "CommandLayout",
    "FoundLayout",
    "StoredSetLayout",
    "TableAccessLayout",
    "TokenTable",
    "place",
    "table_rows",
    "words_of_table",
]

#: Token tables, in the numbering of the table port.
TABLES = ("token", "pair", "successor")

#: Sets that an entry of each table gives, latest choice first.
KEPT = {"token": ("T", "T2"), "pair": ("Q",), "successor": ("S",)}

#: Bits of a tag.
TAG_BITS = 16

#: Row words in a bank, which are the words of a block RAM of the ECP5 at its 9 bits of width; more
#: where there would be too many banks.
_BANK_DEPTH = 2048
_MOST_BANKS = 8

#: Attribute of memories whose words are never looked at when they are read and written in the same
#: cycle, which tells synthesis to spend no logic on what is read then.
NO_COLLISIONS = {"no_rw_check": True}


def table_rows(config):
    """Entries of each table that some head needs, by name."""
    perceptron = config.perceptron
    features = perceptron.features()
    return {
        name: perceptron.pair_rows if name == "pair" else perceptron.token_rows
        for name in TABLES
        if features & set(KEPT[name])
    }


class StoredSetLayout(data.StructLayout):
    """Layout of a set in memory, with a bit that makes its parity even. An unknown set that is
    stored is all zeros.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, config):
        self.config = config
        fields = {key: field.shape for key, field in SetLayout(config)}
        super().__init__({**fields, "parity": 1})

    def store(self, known):
        """A set as it is stored.

        Parameters
        ----------
        known : view of :class:`SetLayout`
            The set. Its experts are 0 if it is not valid.
        """
        return Cat(known.as_value(), known.as_value().xor())

    def known(self, stored):
        """Whether a stored set is valid, has good parity, and names only experts that exist."""
        return stored.valid & ~stored.as_value().xor() & _exist(stored.experts, config=self.config)


def _exist(experts, *, config):
    """Whether all of some experts exist."""
    if config.model.experts == 1 << config.bits("expert"):
        return Const(1, 1)
    return Cat(expert < config.model.experts for expert in experts).all()


class CommandLayout(data.StructLayout):
    """Layout of a command to a token table.

    Parameters
    ----------
    rows : :class:`int`
        Entries of the table, a power of two.

    Members
    -------
    store : 1 bit
        1: store choices, 0: look the entry up.
    entry : ``log2(rows)`` bits
        Entry.
    tag : 16 bits
        Its tag.
    """

    def __init__(self, rows):
        super().__init__(
            {"store": 1, "entry": unsigned(rows.bit_length() - 1), "tag": unsigned(TAG_BITS)}
        )


class FoundLayout(data.StructLayout):
    """Layout of what a table knows about one layer.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    choices : :class:`int`
        Choices that an entry holds.

    Members
    -------
    layer : layer number
        Layer.
    sets : array of :class:`StoredSetLayout`
        Latest choice first, with the parity that it has in memory.
    """

    def __init__(self, config, *, choices):
        super().__init__(
            {
                "layer": unsigned(config.bits("layer")),
                "sets": data.ArrayLayout(StoredSetLayout(config), choices),
            }
        )


class TableAccessLayout(data.StructLayout):
    """Layout of a read or a write of a table word.

    Parameters
    ----------
    tables : :class:`int`
        Tables to choose from.
    """

    def __init__(self, tables=1):
        super().__init__(
            {"table": range(tables), "word": unsigned(24), "write": 1, "value": unsigned(32)}
        )


def place(token, other, *, rows):
    """Entry and tag of a token, or of a pair of tokens.

    Parameters
    ----------
    token : value, 32 bits
        Id of a token.
    other : value, 32 bits, or None
        Of a pair the id of the token before.
    rows : :class:`int`
        Entries of the table, a power of two.

    Returns
    -------
    pair of :class:`amaranth.hdl.Value`
        Entry and tag.
    """
    bits = rows.bit_length() - 1
    entry, tag = token[:bits], token[bits : bits + TAG_BITS]
    if other is not None:
        entry = (token ^ (other << 5) ^ (other >> 9))[:bits]
        tag = (token[bits:] ^ other)[:TAG_BITS]
    return entry, tag


def chunks_of_row(config, *, choices):
    """Table words in a row word."""
    return -(-choices * SetLayout(config).size // 32)


def words_of_table(config, *, rows, choices):
    """Words of a token table, for snapshots.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.
    rows, choices : :class:`int`
        As in :class:`TokenTable`.
    """
    return rows * (1 + config.model.layers * chunks_of_row(config, choices=choices))


class TokenTable(wiring.Component):
    """One token table: choices of all layers under a tag, in block RAM.

    An entry has a tag word {tag, valid, parity} and, for each layer, a row word of ``choices``
    stored sets with a parity bit each. Storing moves the latest choice to the next place if the tag
    matched. Sets come and go with their parity, whatever it is; only for the table port it is
    looked at, where a set with wrong parity reads as 0. A tag word with wrong parity matches
    nothing. Both are told on ``parity_errors``.

    A command of storing takes ``store_cycles`` from its transfer until the table is free, if its
    sets come in time; looking up takes ``find_cycles``, or ``miss_cycles`` if the tag does not
    match, in which case nothing is found. Clearing, after reset too, writes zeros everywhere, a row
    word a cycle.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.
    rows : :class:`int`
        Entries: a power of two from 4 to 2**20.
    choices : :class:`int`
        Choices that an entry holds, 1 or 2.

    Members
    -------
    commands : ``In(stream.Signature(CommandLayout(rows)))``
        Commands, done in order. One waits at most.
    choices_in : ``In(stream.Signature(StoredSetLayout(config)))``
        After a command of storing the choice of each layer, with the parity that it has in memory.
    found : ``Out(stream.Signature(FoundLayout(config, choices=choices)))``
        After a look-up that matches, what is known of each layer in order.
    table_requests : ``In(stream.Signature(TableAccessLayout()))``
        Reads and writes of table words: tag words (tag from bit 0, valid in bit 16), then row
        words (entry, layer, 32 bits from the lowest), all without parity. Beyond the last word a
        read gives 0 and a write does nothing. Done before a command of the same cycle.
    table_values : ``Out(stream.Signature(32))``
        One value for each read.
    clear : ``In(1)``
        A pulse empties the table, after everything that was accepted up to that cycle.
    idle : ``Out(1)``
        Nothing to do and nothing in an output register.
    parity_errors : ``Out(1)``
        Strobe: a word was read with wrong parity.

    Raises
    ------
    TypeError
        If a parameter is not of its type.
    ValueError
        If a parameter is out of its range.
    """

    def __init__(self, config, *, rows, choices):
        require_config(config)
        require_power_of_two("Row count", rows, low=4, high=1 << 20)
        require_integer("Choice count", choices, low=1, high=2)
        self.config = config
        self.rows = rows
        self.choices = choices
        super().__init__(
            {
                "commands": In(stream.Signature(CommandLayout(rows))),
                "choices_in": In(stream.Signature(StoredSetLayout(config))),
                "found": Out(stream.Signature(FoundLayout(config, choices=choices))),
                "table_requests": In(stream.Signature(TableAccessLayout())),
                "table_values": Out(stream.Signature(unsigned(32))),
                "clear": In(1),
                "idle": Out(1),
                "parity_errors": Out(1),
            }
        )

    @property
    def table_words(self):
        """Words of the table, for snapshots."""
        return words_of_table(self.config, rows=self.rows, choices=self.choices)

    @property
    def store_cycles(self):
        """Cycles of a command of storing whose first sets came before it."""
        return self.config.model.layers + 5

    @property
    def find_cycles(self):
        """Cycles of a look-up that matches, if nothing stalls."""
        return self.config.model.layers + 5

    @property
    def miss_cycles(self):
        """Cycles of a look-up that does not match."""
        return 4

    def elaborate(self, platform):
        m = Module()
        config = self.config
        layers = config.model.layers
        rows, choices = self.rows, self.choices
        chunks = chunks_of_row(config, choices=choices)

        stored_layout = StoredSetLayout(config)
        row_layout = data.ArrayLayout(stored_layout, choices)
        checked_layout = data.ArrayLayout(SetLayout(config), choices)
        tag_layout = data.StructLayout({"tag": TAG_BITS, "valid": 1, "parity": 1})
        m.submodules.tags = tags = Memory(
            shape=tag_layout, depth=rows, init=[], attrs=NO_COLLISIONS
        )
        tag_read, tag_write = tags.read_port(), tags.write_port()

        # Row words: what is read is kept before anything is done with it, bank by bank. Block RAMs
        # alone need most of a cycle.
        row_bits = range(rows * layers)
        # ``reads`` brings the word at ``read_address`` to the memory's output, ``capture`` takes
        # what is there.
        read_address, reads, capture = Signal(row_bits), Signal(), Signal()
        row, row_data = Signal(row_layout), Signal(row_layout)
        # Writes wait in a register for a cycle; nothing reads a word that soon.
        row_address, row_enable = Signal(row_bits), Signal()
        written_address = Signal(row_bits, reset_less=True)
        written = Signal(row_layout, reset_less=True)
        m.d.sync += [written_address.eq(row_address), written.eq(row_data)]
        depth = rows * layers
        bank_depth = max(_BANK_DEPTH, 1 << (-(-depth // _MOST_BANKS) - 1).bit_length())
        banks = -(-depth // bank_depth)
        word_bits, bank_bits = bank_depth.bit_length() - 1, (banks - 1).bit_length()
        read_bank, kept_bank = Signal(bank_bits), Signal(bank_bits)
        with m.If(reads):
            m.d.sync += [read_bank.eq(read_address >> word_bits), read_address.eq(read_address + 1)]
        with m.If(capture):
            m.d.sync += kept_bank.eq(read_bank)
        for bank in range(banks):
            memory = Memory(
                shape=row_layout,
                depth=min(bank_depth, depth - bank * bank_depth),
                init=[],
                attrs=NO_COLLISIONS,
            )
            m.submodules[f"row_words{bank}"] = memory
            read, write = memory.read_port(), memory.write_port()
            # Without a reset, so that block RAMs' own registers may do.
            kept = Signal(row_layout, name=f"kept{bank}", reset_less=True)
            enable = Signal(name=f"row_enable{bank}")
            m.d.sync += enable.eq(row_enable & (row_address >> word_bits == bank))
            m.d.comb += [
                read.addr.eq(read_address[:word_bits]),
                read.en.eq(reads),
                write.addr.eq(written_address[:word_bits]),
                write.data.eq(written),
                write.en.eq(enable),
            ]
            with m.If(capture):
                m.d.sync += kept.eq(read.data)
            with m.If(kept_bank == bank):
                m.d.comb += row.eq(kept)

        # What is to be stored comes from memories elsewhere.
        m.submodules.choices = choices_in = TwoBeats(stored_layout)
        wiring.connect(m, wiring.flipped(self.choices_in), choices_in.incoming)

        # A command and a table access wait for their turn.
        command, command_waits = Signal(CommandLayout(rows)), Signal()
        access, access_waits = Signal(TableAccessLayout()), Signal()
        clear_waits, clearing = Signal(init=1), Signal()
        free = Signal()
        m.d.comb += [
            free.eq(~command_waits & ~access_waits & ~clear_waits & ~clearing),
            self.commands.ready.eq(free),
            self.table_requests.ready.eq(free),
        ]
        with m.If(self.commands.valid & free):
            m.d.sync += [command.eq(self.commands.payload), command_waits.eq(1)]
        with m.If(self.table_requests.valid & free):
            m.d.sync += [access.eq(self.table_requests.payload), access_waits.eq(1)]
        with m.If(self.clear):
            m.d.sync += clear_waits.eq(1)

        # Memory outputs are looked at a cycle later, in ``row`` and ``tag``.
        address, at = Signal(row_bits), Signal(range(layers + 1))
        advance, take = Signal(), Signal()
        entry = Signal(command.entry.shape())
        tag = Signal(tag_layout)
        match, matched = Signal(), Signal()
        out_layer, out_valid = Signal(config.bits("layer")), Signal()
        m.d.comb += [
            tag_read.addr.eq(entry),
            self.found.payload.layer.eq(out_layer),
            self.found.payload.sets.eq(row),
            self.found.valid.eq(out_valid),
            match.eq(tag.valid & ~tag.as_value().xor() & (tag.tag == command.tag)),
        ]
        with m.If(advance):
            m.d.sync += [address.eq(address + 1), at.eq(at + 1)]

        # Sums of shifts, which no multiplier is spent on.
        shifts = [n for n in range(layers.bit_length()) if layers >> n & 1]
        first_word = sum((command.entry << n for n in shifts[1:]), command.entry << shifts[0])

        # What a table access reads, each a cycle after the other: the word of the bank that is
        # meant, its parity, the word with 0 for sets whose parity is wrong.
        seen = Signal(row_layout, reset_less=True)
        masked = Signal(checked_layout)
        row_bad = Signal(choices, reset_less=True)
        m.d.sync += seen.eq(row)
        for n in range(choices):
            m.d.sync += row_bad[n].eq(seen[n].as_value().xor())
            with m.If(~row_bad[n]):
                m.d.comb += masked[n].eq(seen[n].as_value()[:-1])
        tag_bad, check_row, check_tag = Signal(), Signal(), Signal()
        m.d.comb += tag_bad.eq(tag.as_value().xor())
        m.d.sync += self.parity_errors.eq((check_row & row_bad.any()) | (check_tag & tag_bad))

        # Writes of rows: zeros, a choice in front of those before, or a word of the table port.
        patched = Signal(32 * chunks)
        clear_address = Signal(row_bits)
        with m.If(clearing):
            m.d.comb += [row_address.eq(clear_address), tag_write.addr.eq(clear_address)]
        with m.Else():
            m.d.comb += [row_address.eq(address), tag_write.addr.eq(entry)]

        value, value_valid = Signal(32), Signal()
        is_tag, index = Signal(), Signal(24)
        chunk = Signal(range(chunks))
        tag_bits = Signal(TAG_BITS + 1)
        m.d.comb += [
            self.table_values.payload.eq(value),
            self.table_values.valid.eq(value_valid),
            patched.eq(masked.as_value()),
        ]
        with m.If(self.table_values.ready):
            m.d.sync += value_valid.eq(0)
        words = [masked.as_value()[32 * n : 32 * n + 32] for n in range(chunks)]
        with m.If(access.write):
            for n in range(chunks):
                with m.If(chunk == n):
                    m.d.comb += patched[32 * n : 32 * n + 32].eq(access.value)
        new_sets = data.View(checked_layout, patched[: checked_layout.size])

        divided, remainder = Signal(range(25)), Signal(range(2 * chunks))
        shifted = Signal(range(2 * chunks))
        m.d.comb += shifted.eq(Cat(index[-1], remainder))

        go = Signal()
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.idle.eq(
                    ~access_waits & ~command_waits & ~clear_waits & ~value_valid & ~out_valid
                )
                m.d.sync += [at.eq(0), divided.eq(0), remainder.eq(0)]
                with m.If(access_waits & ~value_valid):
                    # Beyond the last word is nothing, and the word number would not fit below.
                    m.d.sync += [
                        is_tag.eq(access.word < rows),
                        index.eq(access.word - rows),
                        entry.eq(access.word),
                    ]
                    with m.If(access.word < self.table_words):
                        m.next = "DIVIDE"
                    with m.Else():
                        m.d.sync += [
                            access_waits.eq(0),
                            value.eq(0),
                            value_valid.eq(~access.write),
                        ]
                with m.Elif(command_waits):
                    m.d.sync += [
                        entry.eq(command.entry),
                        address.eq(first_word),
                        read_address.eq(first_word),
                    ]
                    m.next = "FIND"
                with m.Elif(clear_waits & ~value_valid):
                    m.d.sync += clear_address.eq(0)
                    m.next = "CLEAR"
            with m.State("FIND"):
                m.d.comb += reads.eq(1)
                m.next = "CHECK"
            with m.State("CHECK"):
                m.d.sync += tag.eq(tag_read.data)
                m.next = "DECIDE"
            with m.State("DECIDE"):
                # The first row word is at the memory's output from here on.
                m.d.comb += check_tag.eq(1)
                m.d.sync += [
                    matched.eq(match),
                    out_layer.eq(0),
                    command_waits.eq(command.store | match),
                ]
                with m.If(command.store):
                    m.d.comb += tag_write.en.eq(1)
                    m.next = "HOLD"
                with m.Elif(match):
                    m.next = "GIVE"
                with m.Else():
                    m.next = "IDLE"
            with m.State("HOLD"):
                # The row word under way waits in ``row``, the next one at the memory's output.
                m.d.comb += [capture.eq(1), reads.eq(1)]
                m.next = "STORE"
            with m.State("STORE"):
                m.d.comb += [
                    choices_in.outgoing.ready.eq(1),
                    take.eq(choices_in.outgoing.valid),
                    advance.eq(take),
                    capture.eq(take),
                    reads.eq(take),
                    row_enable.eq(take),
                ]
                with m.If(take & (at == layers - 1)):
                    m.d.sync += command_waits.eq(0)
                    m.next = "IDLE"
            with m.State("GIVE"):
                m.d.comb += [
                    go.eq(~out_valid | self.found.ready),
                    advance.eq(go & (at != layers)),
                    capture.eq(go),
                    reads.eq(go),
                ]
                with m.If(go):
                    m.d.sync += out_valid.eq(at != layers)
                    with m.If(out_valid):
                        m.d.sync += out_layer.eq(out_layer + 1)
                        with m.If(out_layer == layers - 1):
                            m.d.sync += command_waits.eq(0)
                            m.next = "IDLE"
            with m.State("DIVIDE"):
                # Row word and chunk of ``index``.
                shift = (chunks - 1).bit_length()
                if chunks == 1 << shift:
                    word = index >> shift
                    m.d.sync += [chunk.eq(index[:shift]), address.eq(word), read_address.eq(word)]
                    m.next = "READ"
                else:
                    m.d.sync += [
                        divided.eq(divided + 1),
                        index.eq(Cat(shifted >= chunks, index)),
                        remainder.eq(Mux(shifted >= chunks, shifted - chunks, shifted)),
                    ]
                    with m.If(divided == 24):
                        m.d.sync += [chunk.eq(remainder), address.eq(index), read_address.eq(index)]
                        m.next = "READ"
            with m.State("READ"):
                m.d.comb += reads.eq(1)
                m.next = "LATCH"
            with m.State("LATCH"):
                m.d.comb += capture.eq(1)
                m.d.sync += tag.eq(tag_read.data)
                m.next = "SEE"
            with m.State("SEE"):
                m.next = "JUDGE"
            with m.State("JUDGE"):
                m.next = "MASK"
            with m.State("MASK"):
                m.d.comb += [check_row.eq(~is_tag), check_tag.eq(is_tag)]
                m.d.sync += tag_bits.eq(Mux(tag_bad, 0, Cat(tag.tag, tag.valid)))
                m.next = "ANSWER"
            with m.State("ANSWER"):
                with m.If(access.write):
                    m.d.comb += [tag_write.en.eq(is_tag), row_enable.eq(~is_tag)]
                with m.Else():
                    m.d.sync += value_valid.eq(1)
                with m.If(is_tag):
                    m.d.sync += value.eq(tag_bits)
                with m.Else():
                    for n in range(chunks):
                        with m.If(chunk == n):
                            m.d.sync += value.eq(words[n])
                m.d.sync += access_waits.eq(0)
                m.next = "IDLE"
            with m.State("CLEAR"):
                m.d.comb += [clearing.eq(1), row_enable.eq(1), tag_write.en.eq(1)]
                m.d.sync += clear_address.eq(clear_address + 1)
                with m.If(clear_address == rows * layers - 1):
                    m.d.sync += clear_waits.eq(0)
                    m.next = "IDLE"

        with m.If(clearing):
            pass
        with m.Elif(access_waits):
            new_tag = Cat(access.value[: TAG_BITS + 1])
            m.d.comb += tag_write.data.eq(Cat(new_tag, new_tag.xor()))
            for n in range(choices):
                m.d.comb += row_data[n].eq(stored_layout.store(new_sets[n]))
        with m.Else():
            new_tag = Cat(command.tag, Const(1, 1))
            m.d.comb += [
                tag_write.data.eq(Cat(new_tag, new_tag.xor())),
                row_data[0].eq(choices_in.outgoing.payload),
            ]
            for n in range(1, choices):
                before = row[n - 1]
                with m.If(matched & before.valid & _exist(before.experts, config=config)):
                    m.d.comb += row_data[n].eq(before)
        return m
