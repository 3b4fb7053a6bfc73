"""The experts' bytes and which tiles of them are valid."""

from amaranth import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.checks import require_integer
from prestage_hw.contract.params import require_config
from prestage_hw.layouts import RecordLayout

__all__ = ["Storage"]

# Rows of one memory of the data: as deep as an ECP5 block RAM is at nine bits.
_BANK_ROWS = 2048

# Memories that one stage chooses among.
_CHOICES = 4

# Reads under way and beats that wait for the consumer, together: a power of two above the latency.
_WAITING = 8


class Storage(wiring.Component):
    """Write arriving beats to their slots and read beats for the consumer.

    One beat is written and one is read in each cycle. A beat is written to the memory in the cycle
    after the one in which it is taken, tile-valid bits two cycles after ``valid_write``. Data and
    tile-valid bits of a read are read in the same cycle. A read waits while its beat, or the
    tile-valid bits of its slot, are written.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts are stored.
    bank : :class:`int`
        Bank whose slots are stored: those whose number leaves it as the rest after a division by
        ``config.replicas``. Writes to others change nothing.

    Attributes
    ----------
    read_latency : :class:`int`
        Cycles from the cycle in which a read is taken to the first in which its beat is offered,
        where ``beats`` never waits: 6, or 7 where the data take more than four memories.

    Members
    -------
    writes : ``In(stream.Signature(RecordLayout("BufferWrite", config=config)))``
        Beats of arriving experts. Always ready.
    reads : ``In(stream.Signature(RecordLayout("ReadRequest", config=config)))``
        Beats wanted by the consumer.
    beats : ``Out(stream.Signature(RecordLayout("Beat", config=config)))``
        The beats in the order of the reads. ``ok`` is the valid bit of the beat's tile; it is 0 for
        a slot or a beat out of range, and for a slot of another bank.
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
        If ``config`` is not a :class:`DeviceConfig`, or the bank no integer.
    ValueError
        If there is no such bank.
    """

    def __init__(self, *, config, bank=0):
        require_config(config)
        require_integer("Bank", bank, low=0, high=config.replicas - 1)
        self.config = config
        self.bank = bank
        self._aligned = config.expert_beats & (config.expert_beats - 1) == 0
        self._depth = config.slots // config.replicas * config.expert_beats
        self._deep = self._depth > _CHOICES * _BANK_ROWS
        self.read_latency = 7 if self._deep else 6
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
        slot = self._in_bank(place.slot)
        if self._aligned:
            return Cat(place.beat, slot)
        return slot * self.config.expert_beats + place.beat

    def _in_bank(self, slot):
        """Number of a slot among those of its bank."""
        return slot[self.config.bank_bits :] if self.config.replicas > 1 else slot

    def _is_mine(self, slot):
        """Whether a slot is of this bank."""
        return slot[: self.config.bank_bits] == self.bank

    def elaborate(self, platform):
        m = Module()
        config = self.config

        depth = self._depth
        # A read waits for writes to what it reads, so that synthesis need not care for those.
        own = {"no_rw_check": 1}
        banks = [
            Memory(
                shape=config.bits("data"),
                depth=min(_BANK_ROWS, depth - first),
                init=[],
                attrs=own,
            )
            for first in range(0, depth, _BANK_ROWS)
        ]
        for number, bank in enumerate(banks):
            m.submodules[f"rows_{number}"] = bank
        m.submodules.valid_rows = valid_rows = Memory(
            shape=config.tiles,
            depth=1 << config.bits("slot") - config.bank_bits,
            init=[],
            attrs=own,
        )
        row = unsigned((depth - 1).bit_length())
        bank_bits = _BANK_ROWS.bit_length() - 1
        write = Signal(data.StructLayout({"addr": row, "data": config.bits("data")}))
        write_banks = Signal(len(banks))  # Bank that is written, a bit each.
        write_row = Signal(row)
        valid_write, valid_read = valid_rows.write_port(), valid_rows.read_port()

        # What the buffer says of tiles comes late in the cycle: it counts from registers.
        valid_slot, valid_tiles = Signal.like(self.valid_slot), Signal.like(self.valid_tiles)
        validates, blank = Signal(), Signal()
        m.d.sync += [
            validates.eq(self.valid_write),
            valid_slot.eq(self.valid_slot),
            valid_tiles.eq(self.valid_tiles),
            blank.eq(self.blank),
        ]
        arriving = self.writes.payload
        arrives, validates_mine = self.writes.valid, validates
        if config.replicas > 1:
            arrives &= self._is_mine(arriving.slot)
            validates_mine &= self._is_mine(valid_slot)
        m.d.comb += [self.writes.ready.eq(1), write_row.eq(self._address(arriving))]
        m.d.sync += [
            write.addr.eq(write_row),
            write.data.eq(arriving.data),
            write_banks.eq(Mux(arrives, 1 << write_row[bank_bits:], 0)),
            valid_write.addr.eq(self._in_bank(valid_slot)),
            valid_write.data.eq(valid_tiles),
            valid_write.en.eq(validates_mine),
        ]

        # Every read that is taken has a place among the beats that wait for the consumer, so that
        # nothing between the first stage and there ever stops: to hold up all block RAMs, far
        # apart, takes longer than a cycle.
        unread = Signal(range(_WAITING + 1))
        m.d.sync += unread.eq(
            unread + (self.reads.valid & self.reads.ready) - (self.beats.valid & self.beats.ready)
        )

        # A request that arrives while the first stage is held waits here.
        waiting = Signal()
        waiting_place = Signal.like(self.reads.payload)
        place = Signal.like(self.reads.payload)
        place_valid = Signal()
        take = Signal()
        m.d.comb += [
            self.reads.ready.eq(~waiting & ~unread[-1]),
            place.eq(Mux(waiting, waiting_place, self.reads.payload)),
            place_valid.eq(waiting | (self.reads.valid & self.reads.ready)),
        ]
        m.d.sync += waiting.eq(place_valid & ~take)
        with m.If(~waiting):
            m.d.sync += waiting_place.eq(self.reads.payload)

        # First stage: address. It is a register even where the slot and the beat are its bits: what
        # depends on it goes to all block RAMs of the data, far apart.
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
            ) | (validates & (place.slot == valid_slot))

        m.d.sync += waits.eq(Mux(take, meets_write(place), meets_write(address_place)))
        m.d.comb += take.eq(~address_valid | ~waits)

        # Second stage: the memories. They always read; what was read counts unless the read waits.
        read_valid = Signal()
        tile_bits = max(1, (config.expert_beats - 1) // config.tile_beats).bit_length()
        read_tile = Signal(tile_bits)
        read_blank = Signal()
        read_bank = Signal(range(len(banks)))
        m.d.comb += valid_read.addr.eq(self._in_bank(address_place.slot))
        not_mine = Const(0)
        if config.replicas > 1:
            not_mine = ~self._is_mine(address_place.slot)
        m.d.sync += [
            read_valid.eq(address_valid & ~waits),
            read_tile.eq(address_place.beat >> (config.tile_beats - 1).bit_length()),
            read_blank.eq(blank | not_mine),
            read_bank.eq(address >> bank_bits),
        ]

        # Third stage: block RAM is slow out of the clock edge, so every bank has its register. That
        # has neither reset nor enable, so that it may be the block RAM's own.
        captured = Signal()
        captured_ok = Signal()
        captured_bank = Signal.like(read_bank)
        words = []
        m.d.sync += [
            captured.eq(read_valid),
            captured_ok.eq((valid_read.data >> read_tile)[0] & ~read_blank),
            captured_bank.eq(read_bank),
        ]
        for number, bank in enumerate(banks):
            bank_read, bank_write = bank.read_port(), bank.write_port()
            word = Signal(config.bits("data"), name=f"word_{number}", reset_less=True)
            words.append(word)
            m.d.comb += [
                bank_read.addr.eq(address),
                bank_write.addr.eq(write.addr),
                bank_write.data.eq(write.data),
                bank_write.en.eq(write_banks[number]),
            ]
            m.d.sync += word.eq(bank_read.data)

        # One more stage, if there are many: those of the choice are far apart.
        if self._deep:
            low_bits = _CHOICES.bit_length() - 1
            low, words_of_all = captured_bank[:low_bits], words
            groups = range(0, len(words_of_all), _CHOICES)
            words = [
                Signal(config.bits("data"), name=f"group_{first // _CHOICES}", reset_less=True)
                for first in groups
            ]
            m.d.sync += [
                word.eq(Array(words_of_all[first : first + _CHOICES])[low])
                for word, first in zip(words, groups, strict=True)
            ]
            later = [Signal.like(s) for s in (captured, captured_ok, captured_bank[low_bits:])]
            m.d.sync += [
                after.eq(before)
                for after, before in zip(
                    later, (captured, captured_ok, captured_bank[low_bits:]), strict=True
                )
            ]
            captured, captured_ok, captured_bank = later

        # The bank's word.
        beat = self.beats.payload.shape()
        chosen = Signal(beat, reset_less=True)
        chosen_valid = Signal()
        m.d.sync += [
            chosen_valid.eq(captured),
            chosen.data.eq(Array(words)[captured_bank]),
            chosen.ok.eq(captured_ok),
        ]

        # Beats wait for the consumer. The one that is offered is in registers.
        m.submodules.waiting = beats = Memory(shape=beat, depth=_WAITING, init=[], attrs=own)
        beats_write, beats_read = beats.write_port(), beats.read_port(domain="comb")
        level = Signal(range(_WAITING + 1))
        leaves = Signal()
        m.d.comb += [
            leaves.eq((level != 0) & (~self.beats.valid | self.beats.ready)),
            beats_write.data.eq(chosen),
            beats_write.en.eq(chosen_valid),
        ]
        m.d.sync += [
            level.eq(level + chosen_valid - leaves),
            beats_write.addr.eq(beats_write.addr + chosen_valid),
            beats_read.addr.eq(beats_read.addr + leaves),
        ]
        with m.If(~self.beats.valid | self.beats.ready):
            m.d.sync += [self.beats.valid.eq(level != 0), self.beats.payload.eq(beats_read.data)]

        return m
