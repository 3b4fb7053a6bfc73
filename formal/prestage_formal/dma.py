"""The DMA engine as a whole: AXI4 rules, credits, and what a demand waits for."""

from amaranth import Array, Cat, Const, Elaboratable, Module, Mux, Signal
from amaranth.hdl import Assert, Assume, Cover

from .arbiter import order_lemmas
from .harness import Held, Inside, drive_freely, lemma
from .instances import dma_device

__all__ = ["AddressChannel", "Credits", "DemandFirst", "LowerCredits"]


def _engine(m, *, but=()):
    """The engine, free at all its inputs but the named ones, and a look into it."""
    from prestage_hw.dma import DMA

    block = DMA(config=dma_device(outstanding_bursts=3))
    inside = Inside(block)
    m.submodules.block = inside.fragment
    drive_freely(m, block, but=but)
    # Whoever asks names a channel that exists, as do the tags; both fill their fields here.
    return block, inside


def _legal_mask(mask):
    return (mask == 0) | (mask == 1) | (mask == 3)


def _settings_lemmas(m, inside):
    """No setting is in force that was not checked."""
    write = inside.signal("settings.write")
    good = inside.signal("settings.good")
    from prestage_hw.dma.settings import ActiveLayout
    from prestage_hw.layouts import RecordLayout

    config = dma_device(outstanding_bursts=3)
    write = RecordLayout("ChannelSettings", config=config)(write)
    beats, credits = write.burst_beats, write.credits
    m.d.comb += [
        lemma(~good | (beats == 1) | (beats == 2) | (beats == 4)),
        lemma(~good | ((credits != 0) & (credits <= 3))),
        lemma(~good | ((write.traffic <= 2) & (write.weight != 0))),
    ]
    active = []
    for c in range(2):
        for kind in ("shadow", "active"):
            layout = ActiveLayout(config=config)(inside.signal(f"settings.{kind}_{c}"))
            m.d.comb += [
                lemma(_legal_mask(layout.mask)),
                lemma((layout.credits != 0) & (layout.credits <= 3)),
            ]
        active.append(layout)
    return active


class _Steps:
    """Inner signals of the mid end that tell what its step does, and lemmas on them."""

    def __init__(self, m, inside):
        from prestage_hw.dma.settings import ActiveLayout

        layout = ActiveLayout(config=dma_device())
        names = ("read", "step", "null", "turn", "chosen", "chosen_null", "chosen_turn", "channel")
        for name in names:
            setattr(self, name, inside.signal(f"midend.{name}"))
        #: A burst was chosen that has not left.
        self.bursts = Signal()
        m.d.comb += self.bursts.eq(
            (self.read & (self.chosen & ~self.chosen_null & ~self.chosen_turn).any())
            | (self.step & ~self.null & ~self.turn)
        )
        number = self.chosen[1]
        active = [layout(inside.signal(f"settings.active_{c}")) for c in range(2)]
        _, _, _, known = order_lemmas(
            m, inside, [setting.traffic for setting in active], prefix="midend.arbiter."
        )
        m.d.comb += [
            lemma(known | (inside.signal("midend.arbiter.wants") == 0)),
            lemma(~(self.read & self.step)),
            lemma((self.chosen & (self.chosen - 1)) == 0),
            lemma(~self.read | (self.chosen != 0)),
            lemma(~self.read | (self.channel == number)),
        ]


class AddressChannel(Elaboratable):
    """Whatever is asked, whatever the memory answers: bursts keep to the rules of AXI4."""

    def elaborate(self, platform):
        m = Module()
        block, inside = _engine(m)
        bus = block.bus
        address = Cat(bus.araddr, bus.arlen, bus.arsize, bus.arburst, bus.arid)
        held = Held(m, bus.arvalid, bus.arready, address, name="address")
        beat = bus.araddr[6:12]
        m.d.comb += [
            Assert(held.kept),
            # Whole beats, within 4 KiB, no longer than the longest burst of the instance.
            Assert(~bus.arvalid | (bus.araddr[:6] == 0)),
            Assert(~bus.arvalid | (beat + bus.arlen < 64)),
            Assert(~bus.arvalid | (bus.arlen < 4)),
            Assert(bus.arsize == 6),
            Assert(bus.arburst == 1),
            Cover(bus.arvalid & bus.arready & (bus.arlen == 3) & (bus.arid == 1)),
            Cover(held.waited & bus.arready & (beat == 63)),
        ]
        steps = _Steps(m, inside)
        _settings_lemmas(m, inside)
        at, fits, mask = (inside.signal(f"midend.{name}") for name in ("at", "fits", "mask"))
        m.d.comb += [
            lemma(~steps.bursts | ~bus.arvalid),
            lemma(_legal_mask(mask)),
            lemma(~steps.step | (fits == (~at[:8] & mask))),
        ]
        return m
