"""Token tables behind a memory port: what was routed when a token was last seen."""

from typing import NamedTuple

from amaranth import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.dma.axi import BURST_INCR, EDGE_BYTES, AXI4Signature

from .tokens import KEPT, NO_COLLISIONS, TABLES, TAG_BITS, StoredSetLayout, table_rows

__all__ = ["MemoryCommandLayout", "MemoryFoundLayout", "Region", "TokenMemory", "token_regions"]

_EPOCH_BITS = 16


class Region(NamedTuple):
    """Where a table lies behind the memory port.

    Parameters
    ----------
    offset : :class:`int`
        First byte, from the base address.
    stride : :class:`int`
        Bytes from an entry to the next, a power of two.
    rows : :class:`int`
        Entries.
    beats : :class:`int`
        Beats of the memory port in an entry.
    set_beats : :class:`int`
        Beats that hold a layer.
    choices : :class:`int`
        Choices that an entry holds.
    """

    offset: int
    stride: int
    rows: int
    beats: int
    set_beats: int
    choices: int


def _header_beats(config):
    return -(-(TAG_BITS + _EPOCH_BITS + 1) // (8 * config.data_bytes))


def token_regions(config):
    """Places of the token tables that some head needs, by name.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.

    Returns
    -------
    :class:`dict` of :class:`Region`
        They follow each other without gaps.
    """
    regions, offset = {}, 0
    for name, rows in table_rows(config).items():
        choices = len(KEPT[name])
        set_beats = -(-choices * StoredSetLayout(config).size // (8 * config.data_bytes))
        beats = _header_beats(config) + config.model.layers * set_beats
        stride = 1 << (beats * config.data_bytes - 1).bit_length()
        regions[name] = Region(offset, stride, rows, beats, set_beats, choices)
        offset += rows * stride
    return regions


class MemoryCommandLayout(data.StructLayout):
    """Layout of a command to the tables: {table, store, entry, tag}, as in
    :class:`prestage_hw.predictor.tokens.CommandLayout`.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.
    """

    def __init__(self, config):
        rows = max(table_rows(config).values(), default=2)
        super().__init__(
            {
                "table": range(len(TABLES)),
                "store": 1,
                "entry": unsigned(rows.bit_length() - 1),
                "tag": unsigned(TAG_BITS),
            }
        )


class MemoryFoundLayout(data.StructLayout):
    """Layout of what a table knows about one layer: {table, layer, sets}. Of tables with one choice
    the second set is nothing.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.
    """

    def __init__(self, config):
        super().__init__(
            {
                "table": range(len(TABLES)),
                "layer": unsigned(config.bits("layer")),
                "sets": data.ArrayLayout(StoredSetLayout(config), 2),
            }
        )


class TokenMemory(wiring.Component):
    """All token tables, with their rows behind an AXI4 port.

    An entry begins with a header {tag 16, epoch 16, parity} and goes on with a word of ``choices``
    stored sets for each layer; header and words each start on a beat. Entries are aligned to their
    stride, see :func:`token_regions`. Bursts are aligned too, so that none crosses a 4 KiB edge,
    and have at most ``config.burst_beats`` beats.

    The memory can't be wiped: an entry whose header has another epoch is empty. The epoch is 1 at
    power-up and moves on with each reset and each ``clear``, skipping 0; it comes round after
    65,535 of them. Before the first use after power-up the host clears the memory, or what an
    earlier run left there may be found again.

    Storing reads the entry first where it keeps two choices. An entry of which a read failed
    matches nothing, and what was found of it is taken back: each layer comes again as unknown. A
    write that failed is left as it is.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.

    Members
    -------
    commands : ``In(stream.Signature(MemoryCommandLayout(config)))``
        Commands, done in order. One waits at most.
    choices_in : ``In(stream.Signature(StoredSetLayout(config)))``
        After a command of storing the choice of each layer, with its parity.
    found : ``Out(stream.Signature(MemoryFoundLayout(config)))``
        After a look-up that matches, what is known of each layer in order.
    bus : ``Out(AXI4Signature(...))``
        Memory. One burst is under way at a time.
    base : ``In(config.address_bits)``
        Address of the first table, taken as a multiple of 4096. Changes only while idle.
    bus_errors : ``Out(1)``
        Strobe: the memory answered an error, or ``rlast`` was not on the last beat.
    clear : ``In(1)``
        A pulse empties the tables, after everything that was accepted up to that cycle.
    idle : ``Out(1)``
        Nothing to do and nothing in an output register.
    parity_errors : ``Out(1)``
        Strobe: a header was read with wrong parity, which matches nothing.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If no head of it needs a table.
    """

    def __init__(self, config):
        require_config(config)
        if not table_rows(config):
            raise ValueError("Heads must need a token table, but there is none")
        self.config = config
        self.regions = token_regions(config)
        super().__init__(
            {
                "commands": In(stream.Signature(MemoryCommandLayout(config))),
                "choices_in": In(stream.Signature(StoredSetLayout(config))),
                "found": Out(stream.Signature(MemoryFoundLayout(config))),
                "bus": Out(
                    AXI4Signature(address_bits=config.address_bits, data_bits=config.bits("data"))
                ),
                "base": In(config.address_bits),
                "bus_errors": Out(1),
                "clear": In(1),
                "idle": Out(1),
                "parity_errors": Out(1),
            }
        )

    @property
    def memory_bytes(self):
        """Bytes of memory that the tables take."""
        return sum(region.rows * region.stride for region in self.regions.values())

    def elaborate(self, platform):
        m = Module()
        config, bus = self.config, self.bus
        layers = config.model.layers
        width = config.bits("data")
        regions = self.regions
        burst = min(config.burst_beats, EDGE_BYTES // config.data_bytes)

        stored_layout = StoredSetLayout(config)
        pair_layout = data.ArrayLayout(stored_layout, 2)
        header_layout = data.StructLayout({"tag": TAG_BITS, "epoch": _EPOCH_BITS, "parity": 1})
        header_beats = _header_beats(config)
        most_beats = max(header_beats, *(region.set_beats for region in regions.values()))
        field_bits = most_beats * width

        command, command_waits = Signal(MemoryCommandLayout(config)), Signal()
        clear_waits = Signal(init=1)
        epoch = Signal(_EPOCH_BITS, init=1, reset_less=True)
        m.d.comb += self.commands.ready.eq(~command_waits & ~clear_waits)
        with m.If(self.commands.valid & self.commands.ready):
            m.d.sync += [command.eq(self.commands.payload), command_waits.eq(1)]
        with m.If(self.clear):
            m.d.sync += clear_waits.eq(1)

        def by_table(value):
            """A constant of the command's table."""
            result = Const(0)
            for number, name in enumerate(TABLES):
                if name in regions:
                    result = Mux(command.table == number, value(regions[name]), result)
            return result

        two_choices = Signal()
        m.d.comb += two_choices.eq(by_table(lambda region: region.choices == 2))

        # Address and length of what is left of the entry, and of the present burst.
        most = max(region.beats for region in regions.values())
        row_offset = Signal(range(max(self.memory_bytes, 2)))
        address = Signal(config.address_bits)
        left, length = Signal(range(most + 1)), Signal(range(burst + 1))
        asked, sent = Signal(8), Signal()  # Length as the bus wants it; all beats are sent.
        m.d.comb += [
            bus.araddr.eq(address),
            bus.arlen.eq(asked),
            bus.arsize.eq(config.data_bytes.bit_length() - 1),
            bus.arburst.eq(BURST_INCR),
            bus.awaddr.eq(address),
            bus.awlen.eq(asked),
            bus.awsize.eq(config.data_bytes.bit_length() - 1),
            bus.awburst.eq(BURST_INCR),
            bus.wstrb.eq(~0),
        ]

        # Reading: beats gather to fields, the header and then the layers. Two registers, so that
        # ``rready`` does not follow ``found.ready``.
        gathered = Signal(field_bits)
        arriving = Signal(field_bits)
        in_field, is_header = Signal(range(most_beats)), Signal()
        field_end, take = Signal(), Signal()
        header, header_check = Signal(header_layout), Signal()
        match, failed = Signal(), Signal()
        out, spare, word = (Signal(pair_layout, name=n) for n in ("out", "spare", "word"))
        out_valid, spare_valid, give = Signal(), Signal(), Signal()
        out_layer, row_layer = Signal(config.bits("layer")), Signal(range(layers + 1))
        m.d.comb += [
            self.found.payload.table.eq(command.table),
            self.found.payload.layer.eq(out_layer),
            self.found.payload.sets.eq(out),
            self.found.valid.eq(out_valid),
            arriving.eq(Cat(gathered, bus.rdata)[width:]),
            field_end.eq(
                in_field
                == Mux(is_header, header_beats, by_table(lambda region: region.set_beats)) - 1
            ),
            match.eq(
                ~header.as_value().xor() & (header.tag == command.tag) & (header.epoch == epoch)
            ),
        ]
        for choices in (1, 2):
            beats = {r.set_beats for r in regions.values() if r.choices == choices}
            for number in beats:
                field = arriving[(most_beats - number) * width :]
                with m.If(two_choices == (choices == 2)):
                    for n in range(choices):
                        at = n * stored_layout.size
                        m.d.comb += word[n].eq(field[at : at + stored_layout.size])

        # What an entry held, for the second choice.
        m.submodules.former = former = Memory(
            shape=stored_layout, depth=layers, init=[], attrs=NO_COLLISIONS
        )
        former_read, former_write = former.read_port(), former.write_port()
        load = Signal()
        m.d.comb += [
            former_write.addr.eq(row_layer),
            former_write.data.eq(word[0]),
            former_read.addr.eq(Mux(load, row_layer + 1, row_layer)),
        ]

        bad_read, bad_write = Signal(), Signal()
        m.d.sync += [
            header_check.eq(0),
            self.parity_errors.eq(header_check & header.as_value().xor()),
            self.bus_errors.eq(bad_read | bad_write),
        ]
        with m.If(take):
            m.d.sync += [gathered.eq(arriving), in_field.eq(in_field + 1)]
            with m.If(field_end):
                m.d.sync += [in_field.eq(0), is_header.eq(0)]
                with m.If(is_header):
                    m.d.sync += [
                        header.eq(arriving[(most_beats - header_beats) * width :]),
                        header_check.eq(1),
                    ]
                with m.Else():
                    m.d.sync += row_layer.eq(row_layer + 1)
                    m.d.comb += [
                        former_write.en.eq(command.store),
                        give.eq(~command.store & match & ~failed),
                    ]
            with m.If(bus.rresp[1] | (bus.rlast != (length == 1))):
                m.d.comb += bad_read.eq(1)
                m.d.sync += failed.eq(1)
        given = Signal()  # Something was found already, which an error takes back.
        erase = Signal()
        with m.If(give | erase):
            m.d.sync += given.eq(1)
        with m.If(~out_valid | self.found.ready):
            m.d.sync += [out_valid.eq(spare_valid | give | erase), spare_valid.eq(0)]
            with m.If(out_valid):
                m.d.sync += out_layer.eq(out_layer + 1)
            with m.If(spare_valid):
                m.d.sync += out.eq(spare)
            with m.Else():
                m.d.sync += out.eq(Mux(erase, 0, word.as_value()))
        with m.Elif(give):
            m.d.sync += [spare.eq(word), spare_valid.eq(1)]

        # Writing: a field is sent beat by beat.
        field, field_left = Signal(field_bits), Signal(range(most_beats + 1))
        wvalid, wdata, wlast = Signal(), Signal(width), Signal()
        new = Signal(header_layout)
        second = Signal(stored_layout)
        m.d.comb += [
            bus.wvalid.eq(wvalid),
            bus.wdata.eq(wdata),
            bus.wlast.eq(wlast),
            new.tag.eq(command.tag),
            new.epoch.eq(epoch),
            new.parity.eq(Cat(command.tag, epoch).xor()),
        ]
        # Known for good some cycles before anything is written.
        keeps_former = Signal()
        m.d.sync += keeps_former.eq(match & ~failed & two_choices)
        with m.If(keeps_former & former_read.data.valid):
            m.d.comb += second.eq(former_read.data)

        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.idle.eq(~command_waits & ~clear_waits)
                m.d.sync += [
                    is_header.eq(1),
                    in_field.eq(0),
                    row_layer.eq(0),
                    out_layer.eq(0),
                    failed.eq(0),
                    given.eq(0),
                ]
                with m.If(command_waits):
                    m.d.sync += [
                        row_offset.eq(
                            by_table(
                                lambda region: (
                                    (command.entry << region.stride.bit_length() - 1)
                                    + region.offset
                                )
                            )
                        ),
                        left.eq(by_table(lambda region: region.beats)),
                    ]
                    m.next = "PLACE"
                with m.Elif(clear_waits):
                    m.d.sync += [
                        epoch.eq(Mux(epoch == (1 << _EPOCH_BITS) - 1, 1, epoch + 1)),
                        clear_waits.eq(0),
                    ]
            with m.State("PLACE"):
                m.d.sync += address.eq(Cat(Const(0, 12), self.base[12:]) + row_offset)
                with m.If(command.store & ~two_choices):
                    m.next = "PREPARE"
                with m.Else():
                    m.next = "SPLIT READ"
            with m.State("SPLIT READ"):
                m.d.sync += [
                    length.eq(Mux(left > burst, burst, left)),
                    asked.eq(Mux(left > burst, burst, left) - 1),
                ]
                m.next = "ASK"
            with m.State("ASK"):
                m.d.comb += bus.arvalid.eq(1)
                with m.If(bus.arready):
                    m.d.sync += [left.eq(left - length), address.eq(address + burst * width // 8)]
                    m.next = "READ"
            with m.State("READ"):
                m.d.comb += [
                    bus.rready.eq(~spare_valid),
                    take.eq(bus.rvalid & bus.rready),
                ]
                with m.If(take):
                    m.d.sync += length.eq(length - 1)
                    with m.If(length == 1):
                        with m.If(left != 0):
                            m.next = "SPLIT READ"
                        with m.Elif(command.store):
                            m.next = "PREPARE"
                        with m.Else():
                            m.next = "FINISH"
            with m.State("FINISH"):
                with m.If(~out_valid & ~spare_valid):
                    m.d.sync += [out_layer.eq(0), row_layer.eq(0)]
                    with m.If(given & failed):
                        m.next = "ERASE"
                    with m.Else():
                        m.d.sync += command_waits.eq(0)
                        m.next = "IDLE"
            with m.State("ERASE"):
                m.d.comb += erase.eq(row_layer != layers)
                with m.If(~out_valid | self.found.ready):
                    m.d.sync += row_layer.eq(row_layer + erase)
                with m.If((row_layer == layers) & ~out_valid):
                    m.d.sync += command_waits.eq(0)
                    m.next = "IDLE"
            with m.State("PREPARE"):
                m.d.sync += [
                    address.eq(Cat(Const(0, 12), self.base[12:]) + row_offset),
                    left.eq(by_table(lambda region: region.beats)),
                    row_layer.eq(0),
                    field.eq(new),
                    field_left.eq(header_beats),
                ]
                m.next = "SPLIT WRITE"
            with m.State("SPLIT WRITE"):
                m.d.sync += [
                    length.eq(Mux(left > burst, burst, left)),
                    asked.eq(Mux(left > burst, burst, left) - 1),
                    sent.eq(0),
                ]
                m.next = "OFFER"
            with m.State("OFFER"):
                m.d.comb += bus.awvalid.eq(1)
                with m.If(bus.awready):
                    m.d.sync += [left.eq(left - length), address.eq(address + burst * width // 8)]
                    m.next = "WRITE"
            with m.State("WRITE"):
                m.d.comb += [
                    self.choices_in.ready.eq((field_left == 0) & ~sent),
                    load.eq(self.choices_in.valid & self.choices_in.ready),
                ]
                with m.If(~wvalid | bus.wready):
                    m.d.sync += [
                        wvalid.eq((field_left != 0) & ~sent),
                        wdata.eq(field[:width]),
                        wlast.eq(length == 1),
                    ]
                    with m.If(sent):
                        m.next = "ANSWER"
                    with m.Elif(field_left != 0):
                        m.d.sync += [
                            field.eq(field >> width),
                            field_left.eq(field_left - 1),
                            length.eq(length - 1),
                            sent.eq(length == 1),
                        ]
                with m.If(load):
                    m.d.sync += [
                        field.eq(Cat(self.choices_in.payload, second)),
                        field_left.eq(by_table(lambda region: region.set_beats)),
                        row_layer.eq(row_layer + 1),
                    ]
            with m.State("ANSWER"):
                m.d.comb += bus.bready.eq(1)
                with m.If(bus.bvalid):
                    m.d.comb += bad_write.eq(bus.bresp[1])
                    with m.If(left != 0):
                        m.next = "SPLIT WRITE"
                    with m.Else():
                        m.d.sync += command_waits.eq(0)
                        m.next = "IDLE"
        return m
