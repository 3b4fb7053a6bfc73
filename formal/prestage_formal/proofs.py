"""The proofs: name, instance, harness, depths, broken twin."""

import importlib
from dataclasses import dataclass, field

from .mutation import Mutation

__all__ = ["PROOFS", "Proof", "Twin"]


@dataclass(frozen=True, kw_only=True)
class Twin(Mutation):
    """A change that must make a proof's harness fail.

    Parameters
    ----------
    depth : :class:`int`
        Cycles after reset within which it must.
    parameters : :class:`dict`
        Keyword arguments of the harness for it: a smaller instance fails sooner.
    """

    depth: int
    parameters: dict = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One proof and its broken twin.

    Parameters
    ----------
    name : :class:`str`
        Name on the command line.
    statement : :class:`str`
        What holds, in a sentence.
    instance : :class:`str`
        Parameters of the RTL that it is proven for.
    harness : :class:`str`
        ``"module:Class"`` in this package.
    depth : :class:`int`
        k of the k-induction, in cycles.
    cover_depth : :class:`int`
        Cycles within which every ``Cover`` must be reached.
    cover_parameters : :class:`dict`
        Keyword arguments of the harness for that: a smaller instance gets there sooner.
    twins : tuple of :class:`Twin`
        Changes that break it, one at a time; the first is the one that the tables name.
    """

    name: str
    statement: str
    instance: str
    harness: str
    depth: int
    cover_depth: int
    twins: tuple[Twin, ...]
    cover_parameters: dict = field(default_factory=dict)

    def build(self, variant):
        """The harness: ``"whole"``, that of the ``"covers"``, or of ``"broken-0"`` and so on.

        Imports the RTL.
        """
        module, _, name = self.harness.partition(":")
        parameters = {"whole": {}, "covers": self.cover_parameters}
        parameters |= {f"broken-{n}": twin.parameters for n, twin in enumerate(self.twins)}
        harness = getattr(importlib.import_module(f"{__package__}.{module}"), name)
        return harness(**parameters[variant])


DMA_INSTANCE = (
    "2 channels, 2 IDs, queues of 2, tiles of 8 beats, bursts of up to 4 beats, 3 outstanding,"
    " 16-bit addresses"
)

BUFFER_INSTANCE = "4 slots, 2 contexts, 2 layers of 4 experts, 1 chosen a token, 2 tiles an expert"

INFLIGHT_INSTANCE = "4 entries, 2 of them for prefetches, 2 contexts, 2 tiles an expert"

WRITER_INSTANCE = "2 channels, tiles of 32 beats of 16 bytes, bursts of up to 16 beats"

QUEUE_INSTANCE = "2 contexts with 2 places each"

PROOFS = (
    Proof(
        name="two-beats",
        statement="TwoBeats hands on every beat once, in order; a waiting beat stays as it is.",
        instance="payload of 4 bits",
        harness="streams:TwoBeatsOrder",
        depth=1,
        cover_depth=6,
        twins=(
            Twin(
                name="the spare register is overwritten",
                module="prestage_hw.predictor.two_beats",
                old="self.incoming.ready.eq(~spare_valid)",
                new="self.incoming.ready.eq(1)",
                depth=8,
            ),
        ),
    ),
    Proof(
        name="order-lists",
        statement="Each list of OrderLists is a queue: entries leave once, in order.",
        instance="2 lists, 4 entries",
        harness="order:OrderListsQueues",
        depth=1,
        cover_depth=7,
        twins=(
            Twin(
                name="an entry that comes as the last one leaves is not the first",
                module="prestage_hw.dma.order",
                old="with m.If(pushed & (~self.filled[i] | (popped & ends))):",
                new="with m.If(pushed & ~self.filled[i]):",
                depth=8,
            ),
        ),
    ),
    Proof(
        name="dma-requests",
        statement="The DMA engine's queues hand on each request once, in order and as it was, and"
        " tell whether it is refused, empty or aborted.",
        instance=DMA_INSTANCE,
        harness="frontend:RequestQueues",
        depth=2,
        cover_depth=8,
        twins=(
            Twin(
                name="a queue that is nearly full has room for two",
                module="prestage_hw.dma.frontend",
                old="(levels[c] != depth) & ~((levels[c] == depth - 1) & incoming_to[c])",
                new="levels[c] != depth",
                depth=8,
            ),
        ),
    ),
    Proof(
        name="arbiter-priority",
        statement="The arbiter chooses one that wants to, of the best class that wants to.",
        instance="3 channels; classes and weights change at will",
        harness="arbiter:ArbiterPriority",
        depth=2,
        cover_depth=6,
        twins=(
            Twin(
                name="the worst class goes first",
                module="prestage_hw.dma.arbiter",
                old="(self.traffic[d] < self.traffic[c])",
                new="(self.traffic[d] > self.traffic[c])",
                depth=6,
            ),
        ),
    ),
    Proof(
        name="arbiter-fairness",
        statement="A channel that wants to loses at most twice the sum of the others' weights in"
        " a row inside its class.",
        instance="3 channels, any constant classes and weights",
        harness="arbiter:ArbiterFairness",
        depth=2,
        cover_depth=14,
        twins=(
            Twin(
                name="grants are not counted down",
                module="prestage_hw.dma.arbiter",
                old="base - chosen[c]",
                new="base",
                depth=24,
            ),
        ),
    ),
    Proof(
        name="dma-address-channel",
        statement="ARVALID and its payload stay until ARREADY; no burst crosses 4 KiB, is longer"
        " than configured, or has a part of a beat.",
        instance=DMA_INSTANCE,
        harness="dma:AddressChannel",
        depth=2,
        cover_depth=14,
        twins=(
            Twin(
                name="bursts do not end where the longest would",
                module="prestage_hw.dma.midend",
                old="fits.eq(~at_read[:8] & settings.mask)",
                new="fits.eq(settings.mask)",
                depth=12,
            ),
        ),
    ),
    Proof(
        name="dma-streams",
        statement="Beats for the buffer and completions stay as they are until they are taken.",
        instance=DMA_INSTANCE,
        harness="dma:Streams",
        depth=2,
        cover_depth=16,
        twins=(
            Twin(
                name="a beat that waits for the buffer makes room",
                module="prestage_hw.dma.backend",
                old="room.eq((~write_valid | self.writes.ready) & (~final | done_room))",
                new="room.eq(~final | done_room)",
                depth=16,
            ),
        ),
    ),
    Proof(
        name="dma-credits",
        statement="A burst leaves only while its channel has fewer outstanding than its credits,"
        " and all together fewer than the engine has; no credit is lost, none is counted twice.",
        instance=DMA_INSTANCE,
        harness="dma:Credits",
        depth=2,
        cover_depth=16,
        twins=(
            Twin(
                name="a burst that was chosen does not count yet",
                module="prestage_hw.dma.midend",
                old="(self.outstanding[c] + (pending & (self.channel == c)) < settings.credits)",
                new="(self.outstanding[c] < settings.credits)",
                depth=20,
            ),
        ),
    ),
    Proof(
        name="dma-read-beats",
        statement="AXI4 reads: a beat that is taken counts once, in order, and a burst takes as"
        " many as were asked for; RREADY is low only while a beat can't go on.",
        instance=DMA_INSTANCE,
        harness="dma:ReadBeats",
        depth=2,
        cover_depth=18,
        twins=(
            Twin(
                name="a burst ends a beat early",
                module="prestage_hw.dma.backend",
                old="ending[i].eq(left == 1)",
                new="ending[i].eq(left == 2)",
                depth=16,
            ),
        ),
    ),
    Proof(
        name="dma-goes-on",
        statement="A step of the DMA engine ends in bounded time, and no request or tile waits"
        " while nothing is in flight.",
        instance=DMA_INSTANCE + "; settings as after reset, watchdog off",
        harness="dma:Goes",
        depth=5,
        cover_depth=22,
        twins=(
            Twin(
                name="a step of a burst never ends",
                module="prestage_hw.dma.midend",
                old="done.eq(step & ~self.hold & (~turn | prepared))",
                new="done.eq(step & ~self.hold & turn & prepared)",
                depth=12,
            ),
        ),
    ),
    Proof(
        name="dma-lower-credits",
        statement="A burst of a class below demand leaves only while fewer of those classes that"
        " somebody waits for are outstanding than lower_credits.",
        instance=DMA_INSTANCE,
        harness="dma:LowerCredits",
        depth=2,
        cover_depth=16,
        twins=(
            Twin(
                name="demands and all others are told apart the wrong way round",
                module="prestage_hw.dma.midend",
                old="(~lower[c] | lower_room)",
                new="(lower[c] | lower_room)",
                depth=20,
            ),
        ),
    ),
    Proof(
        name="dma-demand-first",
        statement="When a demand wants to, at most a tile of beats below it is on its way or"
        " chosen, and nothing below it is chosen.",
        instance=DMA_INSTANCE + "; settings as after reset",
        harness="dma:DemandFirst",
        depth=2,
        cover_depth=16,
        twins=(
            Twin(
                name="bursts below demand have one credit too many",
                module="prestage_hw.dma.midend",
                old="                < self.lower_credits\n",
                new="                <= self.lower_credits\n",
                depth=16,
            ),
            Twin(
                name="the worst class goes first",
                module="prestage_hw.dma.arbiter",
                old="(self.traffic[d] < self.traffic[c])",
                new="(self.traffic[d] > self.traffic[c])",
                depth=16,
            ),
        ),
    ),
    Proof(
        name="buffer-slots",
        statement="A slot that is pinned, filling or locked is never given to another expert; an"
        " expert is in one slot at most; a result names the slot that holds it.",
        instance=BUFFER_INSTANCE,
        harness="buffer:Slots",
        depth=2,
        cover_depth=52,
        cover_parameters={"lru": True, "slots": 1, "contexts": 1, "layers": 1},
        twins=(
            Twin(
                name="a slot that is filling may be taken",
                module="prestage_hw.buffer.buffer",
                old="free = (state.pins == 0) & ~state.filling & ~state.locked",
                new="free = (state.pins == 0) & ~state.locked",
                depth=42,
                parameters={"lru": True, "slots": 1, "contexts": 1, "layers": 1},
            ),
            Twin(
                name="an expert that is given a slot is not entered",
                module="prestage_hw.buffer.buffer",
                old="directory.entry_write.eq(~found & ~further if copies else ~found)",
                new="directory.entry_write.eq(0)",
                depth=60,
                parameters={"lru": True, "slots": 2, "contexts": 1, "layers": 1},
            ),
        ),
    ),
    Proof(
        name="buffer-answers",
        statement="The buffer answers every request in the cycles that it promises, and clears"
        " itself in bounded time.",
        instance=BUFFER_INSTANCE + "; policies LFU and NEXT_USE",
        harness="buffer:Answers",
        depth=2,
        cover_depth=50,
        cover_parameters={"slots": 2, "contexts": 1, "layers": 1},
        twins=(
            Twin(
                name="a release never comes to its last pin",
                module="prestage_hw.buffer.buffer",
                old="done.eq(request.index == self.config.model.top_k - 1)",
                new="done.eq(0)",
                depth=20,
                parameters={"slots": 2, "contexts": 1, "layers": 1},
            ),
        ),
    ),
    Proof(
        name="buffer-walk",
        statement="With the policy LRU the buffer answers every request in the cycles that it"
        " promises: the list is the order of the touches, and the walk along it ends.",
        instance=BUFFER_INSTANCE + "; policy LRU",
        harness="recency:Walk",
        depth=2,
        cover_depth=60,
        cover_parameters={"slots": 3, "contexts": 1, "layers": 1},
        twins=(
            Twin(
                name="the slot that was touched is the most recent a cycle late",
                module="prestage_hw.buffer.recency",
                old="self.newest.eq(self.slot),",
                new="self.newest.eq(self.newest),",
                depth=40,
            ),
        ),
    ),
    Proof(
        name="inflight-demand-first",
        statement="A prefetch's tile is offered only if no demand has tiles left, and at most"
        " prefetch_tiles are on their way; each tile is offered once, in order, and stays.",
        instance=INFLIGHT_INSTANCE,
        harness="inflight:DemandFirst",
        depth=4,
        cover_depth=12,
        twins=(
            Twin(
                name="a choice counts though a fetch began since it was made",
                module="prestage_hw.scheduler.inflight",
                old="changing.eq(self.allocate | self.wait",
                new="changing.eq(self.wait",
                depth=8,
            ),
            Twin(
                name="no channel is ever urgent",
                module="prestage_hw.scheduler.inflight",
                old="Mux(taken_over != 0, urgent_channel, 0)",
                new="0",
                depth=12,
            ),
        ),
    ),
    Proof(
        name="inflight-progress",
        statement="While fetches are taken and hold is low, a tile of a demand is offered every"
        " third cycle, and each demand's in the time for its own and those of earlier demands.",
        instance=INFLIGHT_INSTANCE,
        harness="inflight:Progress",
        depth=4,
        cover_depth=14,
        twins=(
            Twin(
                name="a fetch that begins stays older than those before it",
                module="prestage_hw.scheduler.inflight",
                old="older[i].eq(older[i] & ~target)",
                new="older[i].eq(older[i])",
                depth=12,
            ),
        ),
    ),
    Proof(
        name="throttle-takes",
        statement="The throttle takes what it is told in bounded time, once the statistics take"
        " what it says of that.",
        instance=INFLIGHT_INSTANCE,
        harness="scheduler:ThrottleTakes",
        depth=2,
        cover_depth=20,
        twins=(
            Twin(
                name="the kinds are counted for ever",
                module="prestage_hw.scheduler.throttle",
                old="with m.If(steps[-1]):",
                new="with m.If(0):",
                depth=26,
            ),
        ),
    ),
    Proof(
        name="scheduler-serves",
        statement="The scheduler's machine comes back to what waits in bounded time; a command is"
        " served, or what it waits for is in flight; only commands demand, lock or release.",
        instance=INFLIGHT_INSTANCE,
        harness="scheduler:Machine",
        depth=4,
        cover_depth=30,
        twins=(
            Twin(
                name="a candidate goes before commands",
                module="prestage_hw.scheduler.scheduler",
                old="with m.Elif(queue.valid & may_prefetch & ~self.hold):",
                new="with m.If(queue.valid & may_prefetch & ~self.hold):",
                depth=12,
            ),
            Twin(
                name="a candidate is looked up as a demand",
                module="prestage_hw.scheduler.scheduler",
                old="op.eq(BufferOp.PREFETCH),\n                        ctx.eq(queue.best.ctx)",
                new="op.eq(BufferOp.DEMAND),\n                        ctx.eq(queue.best.ctx)",
                depth=16,
            ),
        ),
    ),
    Proof(
        name="queue-candidates",
        statement="No candidate is lost, doubled or changed in the queue in silence; what is shown"
        " is there and its deadline has not come.",
        instance=QUEUE_INSTANCE,
        harness="queue:Candidates",
        depth=2,
        cover_depth=34,
        twins=(
            Twin(
                name="a newcomer is written to its context's first place",
                module="prestage_hw.scheduler.queue",
                old="write_index = Mux(insert, here[:index_bits], writes[:index_bits])",
                new="write_index = Mux(insert, 0, writes[:index_bits])",
                depth=20,
            ),
        ),
    ),
    Proof(
        name="queue-settles",
        statement="A newcomer is taken within longest_wait cycles, and when nothing comes, leaves"
        " or is routed, the queue shows a candidate or is empty in bounded time.",
        instance=QUEUE_INSTANCE,
        harness="queue:Settles",
        depth=2,
        cover_depth=60,
        twins=(
            Twin(
                name="a newcomer is weighed for ever",
                module="prestage_hw.scheduler.queue",
                old="here.eq(Array(counts)[insert_ctx]),\n"
                "                    state.eq(_State.COMPARE)",
                new="here.eq(Array(counts)[insert_ctx]),\n"
                "                    state.eq(_State.WEIGH)",
                depth=14,
            ),
        ),
    ),
    Proof(
        name="writer-channels",
        statement="AXI4 writes: AWVALID, WVALID and what they offer stay until they are taken; no"
        " burst crosses 4 KiB or is longer than 16; as many beats as announced, the last marked.",
        instance=WRITER_INSTANCE,
        harness="writer:WriteChannels",
        depth=2,
        cover_depth=24,
        twins=(
            Twin(
                name="the beat before the last is marked",
                module="prestage_hw.dma.writer",
                old="last.eq(row == now.length)",
                new="last.eq(row + 1 >= now.length)",
                depth=20,
            ),
        ),
    ),
    Proof(
        name="mover-tiles",
        statement="Whatever the host says, and however often it starts anew, a tile comes back"
        " once, and only if it was asked for.",
        instance=INFLIGHT_INSTANCE + "; mover host",
        harness="mover:HostTiles",
        depth=2,
        cover_depth=22,
        twins=(
            Twin(
                name="the host may report a tile that it was not asked for",
                module="prestage_hw.link.mover",
                old="fits & same & was_asked,",
                new="fits & same,",
                depth=18,
            ),
        ),
    ),
)
