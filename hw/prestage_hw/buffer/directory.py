"""Which expert is in which slot, what each slot holds, and what each context has pinned."""

from amaranth import Cat, Module, unsigned
from amaranth.lib import data, enum, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config

__all__ = ["MARK_BITS", "Directory", "EntryLayout", "EntryState", "PinLayout", "SlotLayout"]

#: Visits of a layer that a prefetch remembers, in bits.
MARK_BITS = 4


class EntryState(enum.Enum, shape=2):
    """Where an expert is."""

    EMPTY = 0
    FILLING = 1
    READY = 2


class EntryLayout(data.StructLayout):
    """What the directory knows of one expert.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        require_config(config)
        super().__init__(
            {
                "state": EntryState,
                "slot": unsigned(config.bits("slot")),
                "evicted_by_prefetch": unsigned(1),
            }
        )


class SlotLayout(data.StructLayout):
    """What a slot holds.

    ``value`` and ``mark`` are a prefetch's confidence and the visits of its layer at that time.
    ``tiles`` repeats the tile-valid bits of :class:`Storage`, so that setting one needs no second
    read port there.

    Only where experts may have copies: ``held`` is 1 for a copy, and for an expert itself while it
    is held for the sake of copies; ``copy`` is the number of the copy, 0 for the expert itself.
    ``links`` of the expert itself say where copy 1 and those after it are; ``links[0].slot`` of a
    copy is the slot of the expert itself.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        require_config(config)
        link = data.StructLayout({"there": 1, "slot": unsigned(config.bits("slot"))})
        copies = {
            "held": unsigned(1),
            "copy": unsigned(config.bits("copy")),
            "links": data.ArrayLayout(link, config.replicas - 1),
        }
        super().__init__(
            {
                "valid": unsigned(1),
                "layer": unsigned(config.bits("layer")),
                "expert": unsigned(config.bits("expert")),
                "filling": unsigned(1),
                "prefetched": unsigned(1),
                "pins": unsigned(config.contexts.bit_length()),
                "locked": unsigned(1),
                "value": unsigned(8),
                "mark": unsigned(MARK_BITS),
                "tiles": unsigned(config.tiles),
                **(copies if config.replicas > 1 else {}),
            }
        )


class PinLayout(data.StructLayout):
    """One pin that a context holds.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        require_config(config)
        super().__init__({"valid": unsigned(1), "slot": unsigned(config.bits("slot"))})


class Directory(wiring.Component):
    """Hold the directory (expert to slot), the slot states (slot to expert) and the pin list.

    Each has a memory of its own. A read takes one cycle: its value is valid in the next cycle and
    stays until the next read of the same memory. A write takes two: block RAMs may be far away, so
    it passes through a register. What is read of a row in the second cycle of its write is not
    valid; in the first it is what was there before.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose experts, slots and contexts are listed.

    Attributes
    ----------
    row_bits : :class:`int`
        Width of ``row``, in bits: enough for the deepest of the three memories.

    Members
    -------
    entry_read : ``In(1)``
        Read the entry of the expert in ``read_key``.
    read_key : ``In(StructLayout({"expert": ..., "layer": ...}))``
        Expert to look up.
    entry : ``Out(EntryLayout(config=config))``
        The entry that was read.
    entry_write : ``In(1)``
        Write ``entry_value`` for the expert in ``write_key``.
    write_key : ``In(StructLayout({"expert": ..., "layer": ...}))``
        Expert whose entry changes.
    entry_value : ``In(EntryLayout(config=config))``
        New entry.
    slot, read_slot : ``In(config.bits("slot"))``
        Slot to write, and slot whose state is read in every cycle, which may come late in it.
    slot_write : ``In(1)``
        Write ``slot_value`` to ``slot``.
    state : ``Out(SlotLayout(config=config))``
        The slot state that was read.
    slot_value : ``In(SlotLayout(config=config))``
        New slot state.
    pin_key : ``In(StructLayout({"index": ..., "layer": ..., "ctx": ...}))``
        Pin to read or write.
    pin_read, pin_write : ``In(1)``
        Read the pin of ``pin_key``; write ``pin_value`` to it.
    pin : ``Out(PinLayout(config=config))``
        The pin that was read.
    pin_value : ``In(PinLayout(config=config))``
        New pin.
    clear : ``In(1)``
        Zero row ``row`` of the directory and of the pin list, and the state of ``slot``. Nothing
        else may be written meanwhile. A write like the others.
    row : ``In(row_bits)``
        Row to clear.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        key = data.StructLayout(
            {"expert": unsigned(config.bits("expert")), "layer": unsigned(config.bits("layer"))}
        )
        pin_key = data.StructLayout(
            {
                "index": unsigned(config.bits("index")),
                "layer": unsigned(config.bits("layer")),
                "ctx": unsigned(config.bits("ctx")),
            }
        )
        self.entry_layout = EntryLayout(config=config)
        self.slot_layout = SlotLayout(config=config)
        self.pin_layout = PinLayout(config=config)
        self.row_bits = max(key.size, pin_key.size, config.bits("slot"))
        self._key_bits = key.size
        self._pin_bits = pin_key.size
        super().__init__(
            {
                "entry_read": In(1),
                "read_key": In(key),
                "entry": Out(self.entry_layout),
                "entry_write": In(1),
                "write_key": In(key),
                "entry_value": In(self.entry_layout),
                "slot": In(unsigned(config.bits("slot"))),
                "read_slot": In(unsigned(config.bits("slot"))),
                "state": Out(self.slot_layout),
                "slot_write": In(1),
                "slot_value": In(self.slot_layout),
                "pin_key": In(pin_key),
                "pin_read": In(1),
                "pin": Out(self.pin_layout),
                "pin_write": In(1),
                "pin_value": In(self.pin_layout),
                "clear": In(1),
                "row": In(self.row_bits),
            }
        )

    def elaborate(self, platform):
        m = Module()

        def rows(shape, bits):
            # What is read while a row is written is not looked at: synthesis need not care for it.
            return Memory(shape=shape, depth=1 << bits, init=[], attrs={"no_rw_check": 1})

        m.submodules.entries = entries = rows(self.entry_layout, self._key_bits)
        m.submodules.slots = slots = rows(self.slot_layout, self.config.bits("slot"))
        m.submodules.pins = pins = rows(self.pin_layout, self._pin_bits)

        entry_read, entry_write = entries.read_port(), entries.write_port()
        slot_read, slot_write = slots.read_port(), slots.write_port()
        pin_read, pin_write = pins.read_port(), pins.write_port()
        m.d.comb += [
            entry_read.addr.eq(self.read_key.as_value()),
            entry_read.en.eq(self.entry_read),
            self.entry.eq(entry_read.data),
            slot_read.addr.eq(self.read_slot),
            slot_read.en.eq(1),
            self.state.eq(slot_read.data),
            pin_read.addr.eq(self.pin_key.as_value()),
            pin_read.en.eq(self.pin_read),
            self.pin.eq(pin_read.data),
        ]
        m.d.sync += [
            entry_write.addr.eq(self.write_key.as_value()),
            entry_write.data.eq(self.entry_value),
            entry_write.en.eq(self.entry_write),
            slot_write.addr.eq(self.slot),
            slot_write.data.eq(self.slot_value),
            slot_write.en.eq(self.slot_write),
            pin_write.addr.eq(self.pin_key.as_value()),
            pin_write.data.eq(self.pin_value),
            pin_write.en.eq(self.pin_write),
        ]
        with m.If(self.clear):
            m.d.sync += [
                entry_write.addr.eq(self.row),
                Cat(entry_write.data.as_value(), slot_write.data.as_value()).eq(0),
                Cat(entry_write.en, slot_write.en, pin_write.en).eq(~0),
                pin_write.addr.eq(self.row),
                pin_write.data.as_value().eq(0),
            ]

        return m
