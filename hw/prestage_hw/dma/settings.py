"""Settings of the DMA engine's channels: written at leisure, active all at once."""

from amaranth import Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from prestage_hw.contract.params import require_config
from prestage_hw.contract.records import SettingsRefusal, TrafficClass
from prestage_hw.layouts import RecordLayout

__all__ = ["ActiveLayout", "Settings", "channel_reset", "rows_are_bad", "shape_refusals"]


def channel_reset(config, channel):
    """Settings of a channel after reset, by name, as in the record ``ChannelSettings``.

    Channel 0 is for demands, the last of three or more for streams.
    """
    traffic = TrafficClass.PREFETCH
    if channel == 0:
        traffic = TrafficClass.DEMAND
    elif channel == config.dma_channels - 1 >= 2:
        traffic = TrafficClass.STREAM
    return {
        "enable": 1,
        "traffic": traffic,
        "weight": 1,
        "credits": config.outstanding_bursts,
        "burst_beats": config.longest_burst,
        "row_bytes": 0,
        "row_stride": 0,
    }


def shape_refusals(config, *, traffic, weight, burst_beats, credits):
    """What may be wrong with a channel's shape: pairs of a condition and its ``SettingsRefusal``,
    the first that holds is the reason.
    """
    beats = burst_beats
    return (
        (traffic > max(TrafficClass), SettingsRefusal.TRAFFIC),
        (weight == 0, SettingsRefusal.WEIGHT),
        (
            (beats == 0) | (beats & (beats - 1)).any() | (beats > config.longest_burst),
            SettingsRefusal.BURST,
        ),
        ((credits == 0) | (credits > config.outstanding_bursts), SettingsRefusal.CREDITS),
    )


def rows_are_bad(config, *, row_bytes=None, row_stride=None):
    """Whether rows, or one of their two numbers, are no whole beats or longer than a tile.

    Where the configuration says what rows tiles lie in, a channel must have none.
    """
    part_of_beat = config.data_bytes - 1
    bad = Const(0, 1)
    for size in (row_bytes, row_stride):
        if size is not None:
            bad |= (size & part_of_beat).any()
    return (
        bad if row_bytes is None else bad | (row_bytes > (0 if config.rows else config.tile_bytes))
    )


class ActiveLayout(data.StructLayout):
    """Settings of a channel in the form that the engine uses.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.
    """

    def __init__(self, *, config):
        low = config.data_bytes.bit_length() - 1
        super().__init__(
            {
                "enable": unsigned(1),
                "traffic": unsigned(2),
                "weight": unsigned(4),
                "mask": unsigned(8),  # Longest burst - 1; its ones are an address' beats in it.
                "credits": unsigned(5),
                "rows": unsigned(1),
                "row_left": unsigned((config.tile_beats - 1).bit_length()),  # Beats - 1.
                "stride": unsigned(24 - low),  # Beats.
            }
        )


class Settings(wiring.Component):
    """Shadow and active settings of every channel.

    A write that makes sense goes to the shadow of its channel. ``commit`` makes all shadows active,
    ``latency`` cycles later, with the writes that were taken until then, that cycle's included.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Parameters of the device.

    Members
    -------
    settings : ``In(stream.Signature(RecordLayout("ChannelSettings")))``
        Writes; always ready.
    commit : ``In(1)``
        Make what was written active.
    lower_credits : ``In(5)``
        Most bursts outstanding in the classes below demand, taken with ``commit``; 0 stands for
        ``config.lower_credits``.
    refused : ``Out(1)``
        Strobe: a write was refused, and changed nothing.
    refusal : ``Out(3)``
        A ``SettingsRefusal``: what was wrong with the last write, 0 for nothing.
    active : ``Out(ArrayLayout(ActiveLayout(config=config), config.dma_channels))``
        Active settings.
    active_lower_credits : ``Out(5)``
        Active ``lower_credits``.
    """

    #: Cycles from ``commit`` to ``active``.
    latency = 3

    def __init__(self, *, config):
        require_config(config)
        self.config = config
        super().__init__(
            {
                "settings": In(stream.Signature(RecordLayout("ChannelSettings", config=config))),
                "commit": In(1),
                "lower_credits": In(5),
                "refused": Out(1),
                "refusal": Out(3),
                "active": Out(data.ArrayLayout(ActiveLayout(config=config), config.dma_channels)),
                "active_lower_credits": Out(5, init=config.lower_credits),
            }
        )

    def elaborate(self, platform):
        m = Module()
        config = self.config
        layout = ActiveLayout(config=config)
        low = config.data_bytes.bit_length() - 1
        # Checked from one register into the next.
        offered = Signal(self.settings.payload.shape())
        write = Signal(self.settings.payload.shape())
        arrived = Signal()
        good = Signal()
        commits = Signal(2)
        lower_credits = Signal(5)
        m.d.comb += self.settings.ready.eq(1)
        m.d.sync += [
            offered.eq(self.settings.payload),
            arrived.eq(self.settings.valid),
            write.eq(offered),
            commits.eq(Cat(self.commit, commits)),
        ]
        with m.If(self.commit):
            m.d.sync += lower_credits.eq(self.lower_credits)
        committed = commits[-1]

        refusal = Signal(SettingsRefusal)
        shape = {name: offered[name] for name in ("traffic", "weight", "burst_beats", "credits")}
        rows = {name: offered[name] for name in ("row_bytes", "row_stride")}
        for bad, reason in reversed(
            (
                (offered.channel >= config.dma_channels, SettingsRefusal.CHANNEL),
                *shape_refusals(config, **shape),
                (rows_are_bad(config, **rows), SettingsRefusal.ROWS),
            )
        ):
            with m.If(bad):
                m.d.comb += refusal.eq(reason)
        m.d.sync += [
            self.refused.eq(arrived & (refusal != SettingsRefusal.NONE)),
            good.eq(arrived & (refusal == SettingsRefusal.NONE)),
        ]
        with m.If(arrived):
            m.d.sync += self.refusal.eq(refusal)

        for channel in range(config.dma_channels):
            reset = channel_reset(config, channel)
            init = {
                **{name: reset[name] for name in ("enable", "traffic", "weight", "credits")},
                "mask": reset["burst_beats"] - 1,
            }
            shadow = Signal(layout, init=init, name=f"shadow_{channel}")
            active = Signal(layout, init=init, name=f"active_{channel}")
            following = Signal(layout, name=f"following_{channel}")
            m.d.comb += following.eq(shadow)
            with m.If(good & (write.channel == channel)):
                m.d.comb += [
                    following.enable.eq(write.enable),
                    following.traffic.eq(write.traffic),
                    following.weight.eq(write.weight),
                    following.mask.eq(write.burst_beats - 1),
                    following.credits.eq(write.credits),
                    following.rows.eq(write.row_bytes != 0),
                    following.row_left.eq((write.row_bytes >> low) - 1),
                    following.stride.eq(write.row_stride >> low),
                ]
            m.d.sync += shadow.eq(following)
            with m.If(committed):
                m.d.sync += active.eq(following)
            m.d.comb += self.active[channel].eq(active)
        with m.If(committed):
            m.d.sync += self.active_lower_credits.eq(
                Mux(lower_credits == 0, Const(config.lower_credits, 5), lower_credits)
            )
        return m
