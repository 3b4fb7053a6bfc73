"""The experts' bytes and which tiles of them are valid."""

from amaranth import Array, Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.layouts import RecordLayout

__all__ = ["Storage"]

# Rows of one memory of the data: as deep as an ECP5 block RAM is at nine bits.
_BANK_ROWS = 2048


class Storage(wiring.Component):
    """Write arriving beats to their slots and read beats for the consumer.

    One beat is written and one is read in each cycle. A beat is written to the memory in the cycle
    after the one in which it is taken, tile-valid bits after ``valid_write``. Data and tile-valid
    bits of a read are read in the same cycle. A read waits while its beat, or the tile-valid bits
    of its slot, are written.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are stored.

    Attributes
    ----------
    read_latency : :class:`int`
        Cycles from the cycle in which a read is taken to the first in which its beat is offered,
        where ``beats`` never waits: 4.

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
        self.read_latency = 4
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

        depth = config.slots * config.expert_beats
        banks = [
            Memory(shape=config.bits("data"), depth=min(_BANK_ROWS, depth - first), init=[])
            for first in range(0, depth, _BANK_ROWS)
        ]
        for number, bank in enumerate(banks):
            m.submodules[f"rows_{number}"] = bank
        m.submodules.valid_rows = valid_rows = Memory(
            shape=config.tiles, depth=1 << config.bits("slot"), init=[]
        )
        row = unsigned((depth - 1).bit_length())
        write = Signal(data.StructLayout({"addr": row, "data": config.bits("data"), "en": 1}))
        valid_write, valid_read = valid_rows.write_port(), valid_rows.read_port()

        arriving = self.writes.payload
        m.d.comb += self.writes.ready.eq(1)
        m.d.sync += [
            write.addr.eq(self._address(arriving)),
            write.data.eq(arriving.data),
            write.en.eq(self.writes.valid),
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
        step_capture = Signal()
        read_valid = Signal()
        address = Signal(row)
        address_valid = Signal()
        address_place = Signal.like(place)
        with m.If(take):
            m.d.sync += [
                address.eq(self._address(place)),
                address_valid.eq(place_valid),
                address_place.eq(place),
            ]

        # A read waits while its row or the tile-valid bits of its slot are written. That is known a
        # cycle before, so that little depends on it in the cycle itself.
        waits = Signal()

        def meets_write(place):
            return (
                self.writes.valid & (place.slot == arriving.slot) & (place.beat == arriving.beat)
            ) | (self.valid_write & (place.slot == self.valid_slot))

        m.d.sync += waits.eq(Mux(take, meets_write(place), meets_write(address_place)))
        m.d.comb += take.eq(~address_valid | ((~read_valid | step_capture) & ~waits))
        # Second stage: the memories. The waiting is said once more where synthesis can see that no
        # block RAM has to resolve a collision (which would cost a register and a multiplexer for
        # every data bit).
        slot = address_place.slot
        step_data, step_valid = Signal(), Signal()
        tile_bits = max(1, (config.expert_beats - 1) // config.tile_beats).bit_length()
        read_tile = Signal(tile_bits)
        read_blank = Signal()
        bank_bits = _BANK_ROWS.bit_length() - 1
        read_bank = Signal(range(len(banks)))
        m.d.comb += [
            step_data.eq((~read_valid | step_capture) & ~(write.en & (write.addr == address))),
            step_valid.eq(
                (~read_valid | step_capture) & ~(valid_write.en & (valid_write.addr == slot))
            ),
            valid_read.addr.eq(slot),
            valid_read.en.eq(step_valid),
        ]
        with m.If(~read_valid | step_capture):
            m.d.sync += [
                read_valid.eq(address_valid & ~waits),
                read_tile.eq(address_place.beat >> (config.tile_beats - 1).bit_length()),
                read_blank.eq(self.blank),
                read_bank.eq(address >> bank_bits),
            ]

        # Third stage: block RAM is slow out of the clock edge, so every bank has its register.
        step_output = Signal()
        captured = Signal()
        captured_ok = Signal()
        captured_bank = Signal.like(read_bank)
        words = []
        m.d.comb += step_capture.eq(~captured | step_output)
        with m.If(step_capture):
            m.d.sync += [
                captured.eq(read_valid),
                captured_ok.eq((valid_read.data >> read_tile)[0] & ~read_blank),
                captured_bank.eq(read_bank),
            ]
        for number, bank in enumerate(banks):
            bank_read, bank_write = bank.read_port(), bank.write_port()
            word = Signal(config.bits("data"), name=f"word_{number}")
            words.append(word)
            m.d.comb += [
                bank_read.addr.eq(address),
                # Said for each bank: one signal to all of them is slow.
                bank_read.en.eq(step_data & (address >> bank_bits == number)),
                bank_write.addr.eq(write.addr),
                bank_write.data.eq(write.data),
                bank_write.en.eq(write.en & (write.addr >> bank_bits == number)),
            ]
            with m.If(step_capture):
                m.d.sync += word.eq(bank_read.data)

        # Fourth stage: the beat leaves from registers.
        m.d.comb += step_output.eq(~self.beats.valid | self.beats.ready)
        with m.If(step_output):
            m.d.sync += [
                self.beats.valid.eq(captured),
                self.beats.payload.data.eq(Array(words)[captured_bank]),
                self.beats.payload.ok.eq(captured_ok),
            ]

        return m
