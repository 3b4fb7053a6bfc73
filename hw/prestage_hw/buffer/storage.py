"""The experts' bytes and which tiles of them are valid."""

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.layouts import RecordLayout

__all__ = ["Storage"]


class Storage(wiring.Component):
    """Write arriving beats to their slots and read beats for the consumer.

    One beat is written and one is read in each cycle. A beat is written to the memory in the cycle
    in which it is taken, one cycle later if an expert is not a power of two beats. Data and
    tile-valid bits of a read are read in the same cycle. A read waits while its beat, or the
    tile-valid bits of its slot, are written.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are stored.

    Attributes
    ----------
    read_latency : :class:`int`
        Cycles from the cycle in which a read is taken to the first in which its beat is offered,
        where ``beats`` never waits: 3.

    Members
    -------
    writes : ``In(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        Beats of arriving experts. Always ready.
    reads : ``In(stream.Signature(RecordLayout("ReadRequest", config=config)))``
        Beats wanted by the consumer.
    beats : ``Out(stream.Signature(RecordLayout("Beat", config=config)))``
        The beats in the order of the reads. ``ok`` is the valid bit of the beat's tile; it is 0 for
        a slot or a beat out of range.
    valid_write : ``In(1)``
        Set the tile-valid bits of slot ``valid_slot`` to ``valid_tiles``.
    valid_slot : ``In(config.bits("slot"))``
        Slot whose tile-valid bits change.
    valid_tiles : ``In(config.tiles)``
        Tile-valid bits, tile 0 lowest.
    blank : ``In(1)``
        While high, reads are not ``ok``.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        self._aligned = config.expert_beats & (config.expert_beats - 1) == 0
        self.read_latency = 3
        super().__init__(
            {
                "writes": In(stream.Signature(RecordLayout("BufferWrite", config=config))),
                "reads": In(stream.Signature(RecordLayout("ReadRequest", config=config))),
                "beats": Out(stream.Signature(RecordLayout("Beat", config=config))),
                "valid_write": In(1),
                "valid_slot": In(unsigned(config.bits("slot"))),
                "valid_tiles": In(unsigned(config.tiles)),
                "blank": In(1),
            }
        )

    def _address(self, place):
        """Row of a slot's beat."""
        if self._aligned:
            return Cat(place.beat, place.slot)
        return place.slot * self.config.expert_beats + place.beat

    def elaborate(self, platform):
        m = Module()
        config = self.config

        m.submodules.rows = rows = Memory(
            shape=config.bits("data"), depth=config.slots * config.expert_beats, init=[]
        )
        m.submodules.valid_rows = valid_rows = Memory(
            shape=config.tiles, depth=1 << config.bits("slot"), init=[]
        )
        write, read = rows.write_port(), rows.read_port()
        valid_write, valid_read = valid_rows.write_port(), valid_rows.read_port()

        m.d.comb += [
            self.writes.ready.eq(1),
            valid_write.addr.eq(self.valid_slot),
            valid_write.data.eq(self.valid_tiles),
            valid_write.en.eq(self.valid_write),
        ]

        # A request that arrives while the first stage is held waits here, so that `reads.ready`
        # comes from a register.
        waiting = Signal()
        waiting_place = Signal.like(self.reads.payload)
        place = Signal.like(self.reads.payload)
        place_valid = Signal()
        take = Signal()
        m.d.comb += [
            self.reads.ready.eq(~waiting),
            place.eq(Mux(waiting, waiting_place, self.reads.payload)),
            place_valid.eq(waiting | self.reads.valid),
        ]
        m.d.sync += waiting.eq(place_valid & ~take)
        with m.If(~waiting):
            m.d.sync += waiting_place.eq(self.reads.payload)

        # First stage: address. It is a register even where the slot and the beat are its bits: what
        # depends on it goes to all block RAMs of the data, far apart.
        step_memory = Signal()
        address = Signal.like(read.addr)
        address_valid = Signal()
        slot = Signal.like(place.slot)
        tile = Signal(max(1, (config.expert_beats - 1) // config.tile_beats).bit_length())
        m.d.comb += take.eq(~address_valid | step_memory)
        with m.If(take):
            m.d.sync += [
                address.eq(self._address(place)),
                address_valid.eq(place_valid),
                slot.eq(place.slot),
                tile.eq(place.beat >> (config.tile_beats - 1).bit_length()),
            ]
        arriving = self.writes.payload
        if self._aligned:
            m.d.comb += [
                write.addr.eq(self._address(arriving)),
                write.data.eq(arriving.data),
                write.en.eq(self.writes.valid),
            ]
        else:
            write_address = Signal.like(write.addr)
            write_data = Signal.like(write.data)
            write_enable = Signal()
            m.d.sync += [
                write_address.eq(self._address(arriving)),
                write_data.eq(arriving.data),
                write_enable.eq(self.writes.valid),
            ]
            m.d.comb += [
                write.addr.eq(write_address),
                write.data.eq(write_data),
                write.en.eq(write_enable),
            ]

        # Second stage: the memories. A read waits while its row is written: it could not be valid
        # anyway, and no block RAM has to resolve the collision (which would cost a register and a
        # multiplexer for every data bit).
        step_output = Signal()
        collision = Signal()
        read_valid = Signal()
        read_tile = Signal.like(tile)
        read_blank = Signal()
        m.d.comb += [
            collision.eq(
                (write.en & (write.addr == address)) | (valid_write.en & (valid_write.addr == slot))
            ),
            step_memory.eq((~read_valid | step_output) & ~collision),
            read.addr.eq(address),
            read.en.eq(step_memory),
            valid_read.addr.eq(slot),
            valid_read.en.eq(step_memory),
        ]
        with m.If(step_memory):
            m.d.sync += [
                read_valid.eq(address_valid),
                read_tile.eq(tile),
                read_blank.eq(self.blank),
            ]
        with m.Elif(step_output):
            m.d.sync += read_valid.eq(0)

        # Third stage: block RAM is slow out of the clock edge, so the beat leaves from registers.
        m.d.comb += step_output.eq(~self.beats.valid | self.beats.ready)
        with m.If(step_output):
            m.d.sync += [
                self.beats.valid.eq(read_valid),
                self.beats.payload.data.eq(read.data),
                self.beats.payload.ok.eq((valid_read.data >> read_tile)[0] & ~read_blank),
            ]

        return m
