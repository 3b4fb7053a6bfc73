"""Online linear models over routing histories, in integers."""

from enum import IntEnum

from amaranth import Array, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.fifo import SyncFIFOBuffered

from prestage_hw.contract.records import Phase, Source, ValueKind
from prestage_hw.layouts import RecordLayout

from .base import Predictor
from .histories import Histories
from .linear import LinearHead
from .ranking import Ranking
from .sets import SETS, SetLayout
from .trust import Trust
from .two_beats import TwoBeats

__all__ = ["PerceptronPredictor"]

#: Results that candidates are still to be made of, with the truths and hints between them.
_ORDER_DEPTH = 16

#: Most entries of one decision: its truth and three results. One may be on its way in.
_MOST_PUSHES = 4 + 1

#: Cycles from the transfer of a decision to its first question for sets.
_ASK_CYCLES = 3


class _Kind(IntEnum):
    """Kinds of messages, and of entries in the order of results."""

    BEGIN = 0
    DECISION = 1
    HINT = 2
    RESULT = 3


class PerceptronPredictor(Predictor):
    """Rank experts by online linear models over what was routed before.

    ``docs/predictor-perceptron.md`` is the specification. Messages are taken in their order. A
    decision first predicts, then hands learning to the heads, which do it when no prediction is
    due. The head of token start works in the background once the first layers are proposed.

    On an idle predictor, without stalls, from the transfer of a decision:

    ==================================== ====================================
    first candidate valid                at most ``first_candidate_cycles``
    last candidate valid                 at most ``last_candidate_cycles``
    decisions sustained                  one every ``decision_cycles``
    ==================================== ====================================

    Members
    -------
    As in :class:`PredictorSignature`.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    ValueError
        If its predictor is another.
    """

    def __init__(self, config):
        super().__init__(config)
        if config.predictor != "perceptron":
            raise ValueError(f"Predictor must be perceptron, not {config.predictor!r}")
        self._heads = [
            LinearHead(config, head=head, number=number)
            for number, head in enumerate(config.perceptron.heads)
        ]
        self._histories = Histories(config)
        self._ranking = Ranking(config)
        self._trust = Trust(config)

    def _active_words(self, head):
        """Words that a head reads where all its sets are known."""
        return head.active_words(SETS)

    @property
    def _go_cycles(self):
        """Cycles from the last beat of values to the word to rank them."""
        return 6 if self.config.lane_beats == 1 else 5

    @property
    def first_candidate_cycles(self):
        """Cycles from the transfer of a decision to its first candidate, at most."""
        near = self._heads[0]
        predict = near.predict_cycles(self._active_words(near))
        return (
            _ASK_CYCLES
            + self._histories.latency
            + predict
            + self._go_cycles
            + self._ranking.first_candidate_cycles
        )

    @property
    def last_candidate_cycles(self):
        """Cycles from the transfer of a decision to the last candidate for the next layer, at most,
        without stalls.
        """
        ranking = self._ranking
        return self.first_candidate_cycles + (
            (ranking.most_candidates - 1) * ranking.next_candidate_cycles
        )

    @property
    def decision_cycles(self):
        """Cycles from one decision to the next that the predictor sustains, without stalls."""
        heads, ranking = self._heads, self._ranking
        most, k = ranking.most_candidates, self.config.model.top_k
        ahead = [head for head in heads if head.head.horizon]
        # One machine asks for all sets; each head predicts and learns; one ranking for all.
        questions = 2 * len(heads) - 1
        asking = 11 + questions * (self._histories.latency + 5)
        working = max(
            head.predict_interval(self._active_words(head))
            + head.learn_cycles(self._active_words(head))
            for head in heads
        )
        layer = heads[0].value_beats + self._go_cycles + ranking.first_candidate_cycles
        listing = layer + most * ranking.next_candidate_cycles
        listing += (len(ahead) - 1) * (layer + min(k, most) * ranking.next_candidate_cycles)
        return max(asking, working, listing + heads[0].value_beats)

    def elaborate(self, platform):
        m = Module()
        config = self.config
        model = config.model
        layers, top_k, contexts = model.layers, model.top_k, config.contexts
        configs = config.perceptron.heads
        heads = self._heads
        near = [n for n, head in enumerate(configs) if head.horizon]
        start = next(n for n, head in enumerate(configs) if head.name == "P0")
        reuse = next((n for n, head in enumerate(configs) if head.is_reuse), None)

        m.submodules.histories = histories = self._histories
        m.submodules.ranking = ranking = self._ranking
        m.submodules.trust = trust = self._trust
        for head, head_config in zip(heads, configs, strict=True):
            m.submodules[f"head_{head_config.name}"] = head

        ctx_shape, layer_shape = unsigned(config.bits("ctx")), unsigned(config.bits("layer"))
        experts_layout = data.ArrayLayout(unsigned(config.bits("expert")), top_k)
        message_layout = data.StructLayout(
            {
                "kind": 2,
                "ctx": ctx_shape,
                "layer": layer_shape,
                "next": layer_shape,  # of a decision: the first layer to predict, if it exists
                "next_exists": 1,
                "experts": experts_layout,  # of a hint: the first
                "stamp": 8,  # of a hint: its deadline
                "phase": 2,
                "word": 32,  # token, or score
            }
        )

        # Each input has a register of its own; what came first, or stands first in this order,
        # goes on to the queue.
        waits = {kind: Signal(name=f"waits{kind}") for kind in range(3)}
        arrived = [Signal(message_layout, name=f"arrived{kind}") for kind in range(3)]
        take = Signal()
        closed = Signal(init=1)  # no message is taken: a clear waits or is under way
        free = ~(waits[0] | waits[1] | waits[2]) & ~closed
        m.d.comb += [
            self.begin.ready.eq(free),
            self.decisions.ready.eq(free),
            self.hints.ready.eq(free),
        ]
        # What lies in a register that does not wait means nothing.
        for kind, incoming in (
            (_Kind.BEGIN, self.begin),
            (_Kind.DECISION, self.decisions),
            (_Kind.HINT, self.hints),
        ):
            with m.If(~waits[kind]):
                m.d.sync += waits[kind].eq(incoming.valid & incoming.ready)
        next_layer = self.decisions.payload.layer + configs[near[0]].horizon
        with m.If(~waits[_Kind.BEGIN]):
            m.d.sync += [
                arrived[_Kind.BEGIN].ctx.eq(self.begin.payload.ctx),
                arrived[_Kind.BEGIN].phase.eq(self.begin.payload.phase),
                arrived[_Kind.BEGIN].word.eq(self.begin.payload.token),
            ]
        with m.If(~waits[_Kind.DECISION]):
            m.d.sync += [
                arrived[_Kind.DECISION].next.eq(next_layer),
                arrived[_Kind.DECISION].next_exists.eq(next_layer < layers),
                arrived[_Kind.DECISION].ctx.eq(self.decisions.payload.ctx),
                arrived[_Kind.DECISION].layer.eq(self.decisions.payload.layer),
                arrived[_Kind.DECISION].experts.eq(self.decisions.payload.experts),
                arrived[_Kind.DECISION].stamp.eq(self.decisions.payload.stamp),
            ]
        with m.If(~waits[_Kind.HINT]):
            m.d.sync += [
                arrived[_Kind.HINT].ctx.eq(self.hints.payload.ctx),
                arrived[_Kind.HINT].layer.eq(self.hints.payload.layer),
                arrived[_Kind.HINT].experts[0].eq(self.hints.payload.expert),
                arrived[_Kind.HINT].stamp.eq(self.hints.payload.deadline),
                arrived[_Kind.HINT].word.eq(self.hints.payload.score),
            ]
        m.submodules.queue = queue = TwoBeats(message_layout)
        for kind in reversed(range(3)):
            with m.If(waits[kind]):
                m.d.comb += [
                    queue.incoming.payload.eq(arrived[kind]),
                    queue.incoming.payload.kind.eq(kind),
                ]
        m.d.comb += [
            queue.incoming.valid.eq(waits[0] | waits[1] | waits[2]),
            queue.outgoing.ready.eq(take),
        ]
        for kind in range(3):
            earlier = Cat(waits[other] for other in range(kind))
            with m.If(queue.incoming.ready & (earlier == 0) & waits[kind]):
                m.d.sync += waits[kind].eq(0)
        front, present = queue.outgoing.payload, queue.outgoing.valid

        # What is known of each context's token.
        phases = Array(Signal(2, name=f"phase{c}", init=Phase.DECODE) for c in range(contexts))
        stamps = Array(Signal(8, name=f"stamp{c}") for c in range(contexts))
        routed = Array(Signal(layers, name=f"routed{c}") for c in range(contexts))
        known = [
            Array(Signal(layers, name=f"known_{head.name}_{c}") for c in range(contexts))
            for head in configs
        ]

        ctx, layer = front.ctx, front.layer
        phase = phases[ctx]

        def of_layer(flags, name):
            """The bit of the layer in front, two cycles later."""
            parts = Signal(-(-layers // 8), name=f"{name}_parts")
            low, high = layer[:3], layer[3:]
            m.d.sync += parts.eq(
                Cat(flags[at : at + 8].bit_select(low, 1) for at in range(0, layers, 8))
            )
            return parts.bit_select(high, 1) if len(parts) > 1 else parts[0]

        # Of the message in front, valid from its third cycle there on. They stay what they are
        # while it is in work, though its layer is marked as routed meanwhile.
        first, extra, prefill = Signal(), Signal(), Signal()
        wanted = Signal()  # its layers are predicted: it is the first, or an extra one
        settled = Signal()  # the main machine has been at it for a cycle
        verify, was_routed = Signal(), of_layer(routed[ctx], "routed")
        m.d.sync += [verify.eq(phase == Phase.VERIFY), prefill.eq(phase == Phase.PREFILL)]
        with m.If(~settled):
            m.d.sync += [
                first.eq(~was_routed),
                extra.eq(was_routed & verify),
                wanted.eq(~was_routed | verify),
            ]
        visited = Signal()
        m.d.sync += visited.eq(0)
        with m.If(visited):
            m.d.sync += routed[ctx].bit_select(layer, 1).eq(1)
        # Layers that the heads predict at a decision of this one, and whether there are such.
        targets = {n: Signal(layer_shape, name=f"target_{configs[n].name}") for n in near}
        inside = {n: Signal(name=f"inside_{configs[n].name}") for n in near}
        bases = {n: Signal(layer_shape, name=f"base_{configs[n].name}") for n in near}
        deadlines = {n: Signal(8, name=f"deadline_{configs[n].name}") for n in near}
        for n in near:
            target = layer + configs[n].horizon
            m.d.sync += [
                targets[n].eq(target),
                inside[n].eq(target < layers),
                bases[n].eq(layer - configs[n].horizon),
                deadlines[n].eq(front.stamp + configs[n].horizon),
            ]
        hint_is_near = Signal()
        m.d.sync += hint_is_near.eq((front.stamp - stamps[ctx])[:8] == 1)

        # Order of results: what the heads were asked for, with the truths and hints in between.
        order_layout = data.StructLayout(
            {
                "kind": 2,
                "head": range(max(2, len(configs))),
                "ctx": ctx_shape,
                "layer": layer_shape,
                "experts": experts_layout,
                "deadline": 8,
                "threshold": 8,
                "score": 8,
                "far": 1,
                "extra": 1,
            }
        )
        m.submodules.order = order = SyncFIFOBuffered(width=order_layout.size, depth=_ORDER_DEPTH)
        # Entries wait in a register for a cycle; room is made sure of before a message is begun.
        entry, pushed, pushing = Signal(order_layout), Signal(order_layout), Signal()
        roomy = Signal()
        m.d.sync += [
            pushed.eq(entry),
            roomy.eq(order.level + pushing <= _ORDER_DEPTH - 1 - _MOST_PUSHES),
        ]
        m.d.comb += [
            order.w_data.eq(pushed),
            order.w_en.eq(pushing),
            entry.ctx.eq(ctx),
            entry.layer.eq(layer),
            entry.experts.eq(front.experts),
            entry.score.eq(front.word),
            entry.deadline.eq(front.stamp),
            entry.threshold.eq(Mux(hint_is_near, self.threshold, self.far_threshold)),
        ]

        # The walker asks the head of token start for all layers, behind the back of decisions.
        walking = Signal()
        walk_ctx, walk_layer = Signal(ctx_shape), Signal(range(layers + 1))
        walk_ahead = Signal(range(layers + 1))  # layers that are proposed
        overtaken = Signal(layers)  # nearer heads' values of these are there since
        background = Signal(range(layers + 1))  # results of the walker that only V waits for
        proposing = Signal()  # walking, and ``walk_layer`` is below ``walk_ahead``

        # Sets are asked for by the main machine, or by the walker where that has nothing to ask.
        # The question waits in a register, as the histories look up what it names at once.
        wants, may_ask = Signal(), Signal(init=1)
        for_main, for_walker = Signal(), Signal()
        asking = Signal()
        # Answers are taken in one cycle; what follows from it, the next question for one, happens
        # in the cycle after.
        told, walker_told = Signal(), Signal()
        request = Signal.like(histories.requests.payload)
        m.d.comb += histories.requests.valid.eq(asking)
        by_main, main_asked = Signal(), Signal()
        with m.If(histories.requests.ready):
            m.d.sync += asking.eq(0)
        with m.If(told | walker_told):
            m.d.sync += may_ask.eq(1)
        with m.If(told):
            m.d.sync += main_asked.eq(0)
        with m.If(may_ask):
            # Nobody looks at it until it is asked.
            m.d.sync += histories.requests.payload.eq(request)
            with m.If(wants):
                m.d.sync += main_asked.eq(1)
            with m.If(wants | (walking & ~by_main)):
                m.d.sync += [
                    asking.eq(1),
                    may_ask.eq(0),
                    for_main.eq(by_main),
                    for_walker.eq(~by_main),
                ]
        with m.If(histories.sets.valid & histories.sets.ready):
            m.d.sync += [for_main.eq(0), for_walker.eq(0)]
        # Nearer heads' predictions are noted in the cycle after they are told.
        marks = {n: Signal(name=f"mark_{configs[n].name}") for n in near}
        for n in near:
            with m.If(marks[n]):
                m.d.sync += marks[n].eq(0)
                with m.If(~prefill):
                    m.d.sync += known[n][ctx].bit_select(targets[n], 1).eq(1)
        arrived_sets = Signal()
        m.d.comb += arrived_sets.eq(histories.sets.valid & for_main)
        used_sets, walker_used_sets = Signal(), Signal()
        m.d.comb += histories.sets.ready.eq(used_sets | walker_used_sets)
        m.d.sync += [told.eq(used_sets), walker_told.eq(walker_used_sets)]

        sets = Signal(data.ArrayLayout(SetLayout(config), len(SETS)))
        # Which head the answer to the main machine is for, from registers: they are set when the
        # machine begins to ask, and fall when it is told.
        predicting = {
            n: Signal(name=f"predicting_{configs[n].name}")
            for n in (*near, *([] if reuse is None else [reuse]))
        }
        teaching = [Signal(name=f"teaching_{head.name}") for head in configs]
        own = Signal()  # set A is the decision itself, which the histories may not have yet
        m.d.comb += [
            sets.eq(histories.sets.payload),
            own.eq(Cat(predicting[n] for n in near).any()),
        ]
        with m.If(own & for_main):
            m.d.comb += [sets[0].experts.eq(front.experts), sets[0].valid.eq(1)]

        has_known = [Signal(name=f"has_known_{head.name}") for head in configs]
        for number, head in enumerate(heads):
            m.d.comb += [
                head.predicts.payload.ctx.eq(ctx),
                head.predicts.payload.layer.eq(targets.get(number, layer)),
                head.predicts.payload.sets.eq(sets),
                head.predicts.payload.extra.eq(0 if number == reuse else extra | prefill),
                head.learns.payload.ctx.eq(ctx),
                head.learns.payload.layer.eq(layer),
                head.learns.payload.sets.eq(sets),
                head.learns.payload.used.eq(front.experts),
                head.learns.payload.skip.eq(~has_known[number] if number == reuse else 0),
            ]
        unwanted = Signal()  # the first question is asked before it is known whether it is needed
        m.d.comb += unwanted.eq(own & ~wanted)
        answers = []
        for flags, inputs in (
            (predicting, {n: head.predicts for n, head in enumerate(heads)}),
            (dict(enumerate(teaching)), {n: head.learns for n, head in enumerate(heads)}),
        ):
            for number, flag in flags.items():
                m.d.comb += inputs[number].valid.eq(arrived_sets & flag & ~unwanted)
                answers.append(flag & inputs[number].ready)
        m.d.comb += used_sets.eq(arrived_sets & (unwanted | Cat(answers).any()))
        walked = heads[start].predicts
        m.d.comb += [
            walked.payload.ctx.eq(walk_ctx),
            walked.payload.layer.eq(walk_layer),
            walked.payload.extra.eq(phases[walk_ctx] == Phase.PREFILL),
        ]
        # Its predictions are noted in the cycle after they are told, too.
        walk_mark, marked_layer = Signal(), Signal(layer_shape)
        m.d.sync += [walk_mark.eq(0), marked_layer.eq(walk_layer)]
        with m.If(walk_mark):
            m.d.sync += known[start][walk_ctx].bit_select(marked_layer, 1).eq(1)
        push_walked = Signal()
        walk_deadline = Signal(8)
        m.d.sync += walk_deadline.eq(stamps[walk_ctx] + walk_layer + 1)
        with m.If(for_walker & histories.sets.valid):
            with m.If(~proposing | roomy):
                m.d.comb += [walked.valid.eq(1), walker_used_sets.eq(walked.ready)]
        with m.If(walker_told):
            m.d.sync += walk_layer.eq(walk_layer + 1)
            with m.If(walk_layer + 1 == walk_ahead):
                m.d.sync += proposing.eq(0)
            with m.If(walk_layer == layers - 1):
                m.d.sync += walking.eq(0)
            m.d.sync += walk_mark.eq(phases[walk_ctx] != Phase.PREFILL)
            with m.If(proposing):
                m.d.comb += [
                    push_walked.eq(1),
                    entry.kind.eq(_Kind.RESULT),
                    entry.head.eq(start),
                    entry.ctx.eq(walk_ctx),
                    entry.layer.eq(walk_layer),
                    entry.deadline.eq(walk_deadline),
                    entry.threshold.eq(Mux(walk_layer == 0, self.threshold, self.far_threshold)),
                    entry.far.eq(walk_layer != 0),
                    entry.extra.eq(0),
                ]
        stored = Signal()
        issued = Signal()
        m.d.comb += issued.eq(walker_told & ~proposing)
        m.d.sync += background.eq(background + issued - stored)

        m.d.comb += [
            histories.begins.payload.ctx.eq(ctx),
            histories.begins.payload.phase.eq(front.phase),
            histories.begins.payload.token.eq(front.word),
            histories.routes.payload.ctx.eq(ctx),
            histories.routes.payload.layer.eq(layer),
            histories.routes.payload.experts.eq(front.experts),
            trust.begins.payload.ctx.eq(ctx),
        ]
        with m.If(by_main):
            m.d.comb += [request.ctx.eq(ctx), request.layer.eq(layer), request.base.eq(layer)]
        with m.Else():
            m.d.comb += [request.ctx.eq(walk_ctx), request.layer.eq(walk_layer)]

        blocks = [*heads, histories, ranking, trust]
        rested = Signal(len(blocks))  # blocks that were idle in the cycle before
        m.d.sync += rested.eq(Cat(block.idle for block in blocks))
        collecting, values_held = Signal(), Signal()
        resting = Signal()  # the main machine is
        done, was_done = Signal(), Signal()  # the walker and all results are
        calm, was_calm = Signal(), Signal()  # all is done that is not in a block
        quiet = Signal()  # all that was begun is done
        push_main = Signal()
        clear_waits = Signal()
        with m.If(self.clear):
            m.d.sync += [clear_waits.eq(1), closed.eq(1)]
        m.d.comb += [
            done.eq(~walking & ~collecting & (order.level == 0) & ~pushing & (background == 0)),
            calm.eq(resting & done & ~values_held),
            # A block that was given something in the cycle before last does not rest.
            quiet.eq(calm & was_calm & rested.all()),
        ]
        m.d.sync += [was_done.eq(resting & done), was_calm.eq(calm)]
        m.d.sync += pushing.eq(push_main | push_walked)
        # As it was in the cycle before. Whatever ends it is followed by a cycle or more in another
        # state, so that the main machine sees it in time.
        was_quiet = Signal()
        m.d.sync += was_quiet.eq(quiet)
        # What the histories and the trust are still to be told of the message in front.
        begin_due, trust_due, route_due = Signal(), Signal(), Signal()
        for due, taker in (
            (begin_due, histories.begins),
            (trust_due, trust.begins),
            (route_due, histories.routes),
        ):
            m.d.comb += taker.valid.eq(due)
            with m.If(taker.ready):
                m.d.sync += due.eq(0)

        # Table port.
        asked_table = Signal.like(self.table_requests.payload)
        tables = [
            (head, number)
            for head in heads
            for number, words in enumerate(head.table_words)
            if words
        ]
        tables += [(histories, number) for number in range(3) if histories.table_words(number)]

        def words_of(block, number):
            """Words of a block's table."""
            if block is histories:
                return histories.table_words(number)
            return block.table_words[number]

        words = Signal(24)
        with m.Switch(self.table_select):
            for number, (block, inner) in enumerate(tables):
                with m.Case(number):
                    m.d.comb += words.eq(words_of(block, inner))
        m.d.sync += self.table_words.eq(words)
        # Which table a request is for is found out in a cycle of its own.
        table_target, table_known = Signal(len(tables)), Signal()
        table_sent, table_taken = Signal(), Signal()
        table_value, table_found = Signal(32), Signal()
        found_value, was_found = Signal(32), Signal()  # a cycle later
        m.d.sync += [found_value.eq(table_value), was_found.eq(table_found)]
        tabling = Signal()
        for number, (block, inner) in enumerate(tables):
            m.d.sync += table_target[number].eq(
                (asked_table.table == number) & (asked_table.word < words_of(block, inner))
            )
        for block in (*heads, histories):
            mine = [number for number, (other, _) in enumerate(tables) if other is block]
            chosen = Cat(table_target[number] for number in mine).any() if mine else Const(0)
            m.d.comb += [
                block.table_requests.payload.word.eq(asked_table.word),
                block.table_requests.payload.write.eq(asked_table.write),
                block.table_requests.payload.value.eq(asked_table.value),
                block.table_requests.valid.eq(tabling & table_known & ~table_sent & chosen),
                block.table_values.ready.eq(tabling & table_sent),
            ]
            for number in mine:
                with m.If(table_target[number]):
                    m.d.comb += block.table_requests.payload.table.eq(tables[number][1])
            with m.If(chosen):
                m.d.comb += table_taken.eq(block.table_requests.ready)
            with m.If(tabling & table_sent & block.table_values.valid):
                m.d.comb += [table_found.eq(1), table_value.eq(block.table_values.payload)]
        with m.If(self.table_values.ready):
            m.d.sync += self.table_values.valid.eq(0)

        def learn_after(number):
            """State that learning goes on with after a head's number."""
            following = [n for n in (*near, start) if n > number]
            return f"Learn {configs[following[0]].name}" if following else after_learning

        # What the heads have predicted of the layer in front, and as long after the walker whether
        # it has passed the layer.
        for flags, flag in zip(known, has_known, strict=True):
            m.d.sync += flag.eq(of_layer(flags[ctx], flag.name))
        passing, passed_by, has_passed = Signal(), Signal(), Signal()
        m.d.sync += [
            passing.eq(~walking | (walk_layer > layer)),
            passed_by.eq(passing),
            has_passed.eq(passed_by),
        ]
        # What is learned or, of reuse, predicted is noted in the cycle thereafter.
        taught = [Signal(name=f"taught_{head.name}") for head in configs]
        for flags, flag, head_config in zip(known, taught, configs, strict=True):
            with m.If(flag):
                m.d.sync += flags[ctx].bit_select(layer, 1).eq(head_config.is_reuse)
                m.d.sync += flag.eq(0)

        after_learning = "Done" if reuse is None else "Reuse now"

        # The truth goes to the hints before any result of its decision, as soon as it is known
        # whether the decision is the first.
        truth_waits, truth_now = Signal(), Signal()
        m.d.sync += truth_now.eq(truth_waits)
        with m.If(truth_waits):
            m.d.sync += truth_waits.eq(0)
        for n in near:
            horizon = configs[n].horizon
            with m.If(predicting[n]):
                m.d.comb += [
                    entry.kind.eq(_Kind.RESULT),
                    entry.head.eq(n),
                    entry.layer.eq(targets[n]),
                    entry.deadline.eq(deadlines[n]),
                    entry.threshold.eq(self.threshold if horizon == 1 else self.far_threshold),
                    entry.far.eq(horizon != 1),
                    entry.extra.eq(extra),
                ]
        with m.If(truth_now):
            m.d.comb += [
                entry.kind.eq(_Kind.DECISION),
                entry.layer.eq(layer),
                push_main.eq(first),
            ]

        with m.FSM(init="Clear wait") as fsm:
            with m.State("Clear"):
                m.d.comb += [block.clear.eq(1) for block in (*heads, histories, trust)]
                m.d.sync += clear_waits.eq(0)
                for c in range(contexts):
                    m.d.sync += [phases[c].eq(Phase.DECODE), routed[c].eq(0)]
                    m.d.sync += [flags[c].eq(0) for flags in known]
                m.next = "Clear start"
            # The blocks have begun before it is looked at what they were a cycle earlier.
            with m.State("Clear start"):
                m.next = "Clear started"
            with m.State("Clear started"):
                m.next = "Clear wait"
            with m.State("Clear wait"):
                with m.If(rested.all()):
                    m.d.sync += closed.eq(clear_waits | self.clear)
                    m.next = "Idle"

            with m.State("Idle"):
                nearest = configs[near[0]]
                with m.If(present & (front.kind == _Kind.DECISION) & ~proposing):
                    m.d.comb += [
                        by_main.eq(1),
                        request.layer.eq(front.next),
                        request.horizon.eq(nearest.horizon),
                    ]
                m.d.sync += [table_sent.eq(0), table_known.eq(0)]
                with m.If(present):
                    with m.Switch(front.kind):
                        with m.Case(_Kind.BEGIN):
                            # The first layers' candidates come before those of any decision, and
                            # all of an earlier token's before them.
                            with m.If(was_done):
                                m.d.sync += [begin_due.eq(1), trust_due.eq(1)]
                                m.next = "Begin"
                        with m.Case(_Kind.DECISION):
                            with m.If(~proposing & roomy):
                                # The first question goes out at once, needed or not.
                                m.d.sync += [stamps[ctx].eq(front.stamp), truth_waits.eq(1)]
                                m.d.comb += wants.eq(front.next_exists)
                                m.d.sync += predicting[near[0]].eq(front.next_exists)
                                m.next = f"Ask {nearest.name}"
                                with m.If(front.next_exists):
                                    m.next = f"Predict {nearest.name}"
                        with m.Case(_Kind.HINT):
                            with m.If(~proposing & roomy):
                                m.next = "Hint"
                with m.Elif(waits[0] | waits[1] | waits[2]):
                    pass
                with m.Elif(clear_waits):
                    with m.If(was_quiet & ~self.table_values.valid):
                        m.next = "Clear"
                with m.Elif(was_quiet & ~self.table_values.valid):
                    # In the cycle of its transfer a request comes before messages.
                    m.d.comb += self.table_requests.ready.eq(1)
                    m.d.sync += asked_table.eq(self.table_requests.payload)
                    with m.If(self.table_requests.valid):
                        m.next = "Table"

            with m.State("Hint"):
                m.d.comb += [push_main.eq(1), entry.kind.eq(_Kind.HINT)]
                m.next = "Hinted"
            with m.State("Hinted"):
                m.d.comb += take.eq(1)
                m.next = "Idle"

            with m.State("Begin"):
                with m.If(~begin_due & ~trust_due):
                    m.d.comb += take.eq(1)
                    m.d.sync += [
                        phases[ctx].eq(front.phase),
                        routed[ctx].eq(0),
                        walking.eq(1),
                        proposing.eq(self.ahead != 0),
                        walk_ctx.eq(ctx),
                        walk_layer.eq(0),
                        walk_ahead.eq(Mux(self.ahead > layers, layers, self.ahead)),
                        overtaken.eq(0),
                    ]
                    for number, flags in enumerate(known):
                        if number != reuse:
                            m.d.sync += flags[ctx].eq(0)
                    m.next = "Idle"

            for at, number in enumerate(near):
                horizon = configs[number].horizon
                following = f"Ask {configs[near[at + 1]].name}" if at + 1 < len(near) else "Route"
                question = [
                    by_main.eq(1),
                    request.layer.eq(targets[number]),
                    request.horizon.eq(horizon),
                ]
                with m.State(f"Ask {configs[number].name}"):
                    needed = inside[number] & wanted & settled
                    m.d.comb += [*question, wants.eq(needed)]
                    m.d.sync += predicting[number].eq(needed)
                    with m.If(needed):
                        m.next = f"Predict {configs[number].name}"
                    with m.Elif(settled):
                        m.next = following
                with m.State(f"Predict {configs[number].name}"):
                    m.d.comb += [*question, wants.eq(~main_asked)]
                    with m.If(told):
                        m.d.comb += push_main.eq(wanted)
                        m.d.sync += [predicting[number].eq(0), marks[number].eq(wanted & ~extra)]
                        m.next = following
            with m.State("Route"):
                m.d.sync += [route_due.eq(~extra), visited.eq(1)]
                m.next = "Done"
                with m.If(~extra):
                    m.next = "Routed"
            with m.State("Routed"):
                with m.If(~route_due):
                    m.next = "Done"
                    with m.If(first & ~prefill):
                        m.next = f"Learn {configs[(*near, start)[0]].name}"
            for number in (*near, start):
                name = configs[number].name
                with m.State(f"Learn {name}"):
                    # The head of token start learns a layer after it has predicted it.
                    passed = has_passed if number == start else 1
                    question = [
                        request.horizon.eq(configs[number].horizon),
                        request.base.eq(bases[number] if number in bases else layer),
                    ]
                    needed = has_known[number] & passed
                    m.d.comb += [*question, by_main.eq(passed), wants.eq(needed)]
                    m.d.sync += teaching[number].eq(needed)
                    with m.If(needed):
                        m.next = f"Teach {name}"
                    with m.Elif(passed):
                        m.next = learn_after(number)
                with m.State(f"Teach {name}"):
                    m.d.comb += [*question, by_main.eq(1), wants.eq(~main_asked)]
                    with m.If(told):
                        m.d.sync += [teaching[number].eq(0), taught[number].eq(1)]
                        m.next = learn_after(number)
            if reuse is not None:
                with m.State("Reuse now"):
                    m.d.comb += [by_main.eq(1), wants.eq(~main_asked)]
                    m.d.comb += [request.reuse.eq(1), request.now.eq(1)]
                    m.d.sync += predicting[reuse].eq(1)
                    with m.If(told):
                        m.d.sync += predicting[reuse].eq(0)
                        m.next = "Reuse old"
                with m.State("Reuse old"):
                    m.d.comb += [by_main.eq(1), wants.eq(~main_asked), request.reuse.eq(1)]
                    m.d.sync += teaching[reuse].eq(1)
                    with m.If(told):
                        m.d.sync += [teaching[reuse].eq(0), taught[reuse].eq(1)]
                        m.next = "Done"
            with m.State("Done"):
                m.d.comb += take.eq(1)
                m.next = "Idle"

            with m.State("Table"):
                m.d.comb += tabling.eq(1)
                m.d.sync += table_known.eq(1)
                with m.If(~table_known):
                    pass
                with m.Elif(~table_sent):
                    with m.If(~table_target.any()):
                        # A word that does not exist reads 0.
                        m.next = "Idle"
                        with m.If(~asked_table.write):
                            m.d.sync += [
                                self.table_values.valid.eq(1),
                                self.table_values.payload.eq(0),
                            ]
                    with m.Elif(table_taken):
                        m.d.sync += table_sent.eq(1)
                with m.Elif(asked_table.write):
                    m.next = "Idle"
                with m.Elif(was_found):
                    m.d.sync += [
                        self.table_values.valid.eq(1),
                        self.table_values.payload.eq(found_value),
                    ]
                    m.next = "Idle"

        self._collect(
            m,
            order=order,
            order_layout=order_layout,
            collecting=collecting,
            overtaken=overtaken,
            background=background,
            walking=walking,
            walk_ctx=walk_ctx,
            stored=stored,
            values_held=values_held,
        )

        # Strobes of several blocks may fall together: each is counted.
        strobes = [block.parity_errors for block in (*heads, histories, trust)]
        if config.token_memory:
            wiring.connect(m, histories.bus, wiring.flipped(self.bus))
            m.d.comb += histories.base.eq(self.base)
            strobes.append(histories.bus_errors)
        errors = Signal(16)
        m.d.sync += [
            errors.eq(errors + sum(strobes) - (errors != 0)),
            self.parity_errors.eq(errors != 0),
        ]

        m.d.comb += resting.eq(fsm.ongoing("Idle"))
        m.d.sync += settled.eq(~resting)
        # Nothing of it falls later than this register but what is looked at here.
        was_idle = Signal()
        m.d.sync += was_idle.eq(
            quiet & (errors == 0) & ~present & ~self.candidates.valid & ~self.table_values.valid
        )
        m.d.comb += self.idle.eq(
            was_idle
            & resting
            & ~(waits[0] | waits[1] | waits[2])
            & ~present
            & ~clear_waits
            & ~self.table_values.valid
        )
        return m

    def _collect(
        self,
        m,
        *,
        order,
        order_layout,
        collecting,
        overtaken,
        background,
        walking,
        walk_ctx,
        stored,
        values_held,
    ):
        """Take results, truths and hints in their order to the trust and the ranking."""
        config = self.config
        heads, ranking, trust = self._heads, self._ranking, self._trust
        start = next(n for n, head in enumerate(config.perceptron.heads) if head.name == "P0")
        ahead = [n for n, head in enumerate(config.perceptron.heads) if not head.is_reuse]
        entry = data.View(order_layout, order.r_data)
        hint, hinted = trust.hints, trust.hinted

        # Two registers for each head keep what holds the ranking up from reaching into the heads.
        beat_layout = heads[start].values.payload.shape()
        held = {}
        for number in ahead:
            name = config.perceptron.heads[number].name
            held[number] = fifo = TwoBeats(beat_layout)
            m.submodules[f"held_{name}"] = fifo
            wiring.connect(m, heads[number].values, fifo.incoming)
        walked = held[start].outgoing
        # What the trust keeps goes out, too, between reuse values.
        m.submodules.chances = chances = SyncFIFOBuffered(
            width=beat_layout.size, depth=max(16, 2 * config.lane_beats)
        )
        m.submodules.given = given = TwoBeats(self.values.payload.shape())
        wiring.connect(m, given.outgoing, wiring.flipped(self.values))
        chance = data.View(beat_layout, chances.r_data)
        reuse = next((n for n, head in enumerate(config.perceptron.heads) if head.is_reuse), None)
        sources = [(ValueKind.CHANCE, chances.r_rdy, chance, chances.r_en)]
        if reuse is not None:
            values = heads[reuse].values
            sources.append((ValueKind.REUSE, values.valid, values.payload, values.ready))
        for kind, valid, payload, ready in reversed(sources):
            with m.If(valid):
                m.d.comb += [
                    given.incoming.valid.eq(1),
                    given.incoming.payload.kind.eq(kind),
                    *(
                        given.incoming.payload[name].eq(payload[name])
                        for name in ("ctx", "layer", "beat", "values")
                    ),
                ]
            earlier = [valid for other, valid, _, _ in sources if other < kind]
            m.d.comb += ready.eq(given.incoming.ready & ~Cat(earlier).any())
        # Two registers at the ranking and at the trust, too: blocks of this size lie far apart.
        m.submodules.to_ranking = to_ranking = TwoBeats(beat_layout)
        m.submodules.to_trust = to_trust = TwoBeats(beat_layout)
        source, moving = Signal.like(entry.head), Signal()
        ranked, trusted = Signal(), Signal()  # who takes the beats of the result in work
        beat, beat_valid, beat_taken = Signal(beat_layout), Signal(), Signal()
        m.d.comb += beat_taken.eq(
            moving
            & (to_ranking.incoming.ready | ~ranked)
            & ((to_trust.incoming.ready & chances.w_rdy) | ~trusted)
        )
        with m.Switch(source):
            for number, fifo in held.items():
                with m.Case(number):
                    m.d.comb += [
                        beat.eq(fifo.outgoing.payload),
                        beat_valid.eq(fifo.outgoing.valid),
                        fifo.outgoing.ready.eq(beat_taken),
                    ]
        # A beat goes to both at once.
        m.d.comb += [
            to_ranking.incoming.payload.eq(beat),
            to_trust.incoming.payload.eq(beat),
            to_ranking.incoming.valid.eq(beat_valid & beat_taken & ranked),
            to_trust.incoming.valid.eq(beat_valid & beat_taken & trusted),
            chances.w_data.eq(beat),
            chances.w_en.eq(to_trust.incoming.valid),
        ]
        last_beat = config.lane_beats - 1
        moved = Signal()
        m.d.comb += moved.eq(beat_valid & beat_taken & (beat.beat == last_beat))
        with m.If(moved):
            m.d.sync += moving.eq(0)
        m.d.comb += values_held.eq(
            Cat(
                *(fifo.outgoing.valid for fifo in held.values()),
                *(valid for _, valid, _, _ in sources),
                chances.level != 0,
                given.outgoing.valid,
            ).any()
        )
        m.d.comb += [
            *(
                block.values.payload[name].eq(fifo.outgoing.payload[name])
                for block, fifo in ((ranking, to_ranking), (trust, to_trust))
                for name in ("ctx", "layer", "beat", "values")
            ),
            *(
                block.values.payload.last.eq(fifo.outgoing.payload.beat == last_beat)
                for block, fifo in ((ranking, to_ranking), (trust, to_trust))
            ),
            ranking.values.valid.eq(to_ranking.outgoing.valid),
            to_ranking.outgoing.ready.eq(ranking.values.ready),
            trust.values.valid.eq(to_trust.outgoing.valid),
            to_trust.outgoing.ready.eq(trust.values.ready),
            ranking.values.payload.deadline.eq(entry.deadline),
            ranking.values.payload.threshold.eq(entry.threshold),
            ranking.values.payload.far.eq(entry.far),
            ranking.patches.payload.expert.eq(trust.patches.payload.expert),
            ranking.patches.payload.value.eq(trust.patches.payload.value),
            ranking.patches.payload.valid.eq(trust.patches.payload.valid),
            ranking.patches.payload.go.eq(trust.patches.payload.go),
            trust.routes.payload.ctx.eq(entry.ctx),
            trust.routes.payload.layer.eq(entry.layer),
            trust.routes.payload.experts.eq(entry.experts),
            hint.payload.ctx.eq(entry.ctx),
            hint.payload.layer.eq(entry.layer),
            hint.payload.expert.eq(entry.experts[0]),
            hint.payload.score.eq(entry.score),
        ]

        candidate, candidate_valid = Signal(RecordLayout("Candidate", config=config)), Signal()
        with m.If(candidate_valid):
            m.d.comb += [
                self.candidates.valid.eq(1),
                self.candidates.payload.eq(candidate),
            ]
            with m.If(self.candidates.ready):
                m.d.sync += candidate_valid.eq(0)
        with m.Else():
            m.d.comb += [
                self.candidates.valid.eq(ranking.candidates.valid),
                self.candidates.payload.eq(ranking.candidates.payload),
                ranking.candidates.ready.eq(self.candidates.ready),
            ]

        overtakes, overtaking = Signal(), Signal.like(entry.layer)
        m.d.sync += [overtakes.eq(0), overtaking.eq(entry.layer)]
        with m.If(overtakes):
            m.d.sync += overtaken.bit_select(overtaking, 1).eq(1)

        with m.FSM() as fsm:
            with m.State("Idle"):
                deciding = order.r_rdy & (entry.kind == _Kind.DECISION)
                waiting = order.r_rdy & (entry.kind == _Kind.RESULT)
                collect, store = Signal(), Signal()
                m.d.comb += [
                    collect.eq(
                        waiting & ((background == 0) | (entry.head == start) | ~walked.valid)
                    ),
                    store.eq(~deciding & (background != 0) & walked.valid),
                ]
                overtaken_since = overtaken.bit_select(walked.payload.layer, 1)
                m.d.sync += [
                    source.eq(Mux(collect, entry.head, start)),
                    moving.eq(collect | store),
                    ranked.eq(collect),
                    trusted.eq(Mux(collect, ~entry.extra, ~overtaken_since)),
                ]
                with m.If(deciding):
                    m.d.comb += trust.routes.valid.eq(1)
                    with m.If(trust.routes.ready):
                        m.d.comb += order.r_en.eq(1)
                with m.Elif(collect):
                    m.next = "Collect"
                with m.Elif(store):
                    m.next = "Store"
                with m.Elif(order.r_rdy & (entry.kind == _Kind.HINT)):
                    with m.If(~walking & (background == 0) & ranking.idle & trust.idle):
                        with m.If(~candidate_valid):
                            m.next = "Hint"
            with m.State("Collect"):
                with m.If(moved):
                    m.next = "Patch"
                    # Not when they are asked for: hints in between count on the walker's values.
                    m.d.sync += overtakes.eq(
                        trusted & (entry.head != start) & (entry.ctx == walk_ctx)
                    )
            with m.State("Patch"):
                with m.If(entry.extra):
                    m.d.comb += [
                        ranking.patches.valid.eq(1),
                        ranking.patches.payload.valid.eq(0),
                        ranking.patches.payload.go.eq(1),
                    ]
                with m.Else():
                    m.d.comb += [
                        ranking.patches.valid.eq(trust.patches.valid),
                        trust.patches.ready.eq(ranking.patches.ready),
                    ]
                with m.If(
                    ranking.patches.valid & ranking.patches.ready & ranking.patches.payload.go
                ):
                    m.d.comb += order.r_en.eq(1)
                    m.next = "Idle"
            with m.State("Store"):
                with m.If(moved):
                    m.next = "Stored"
                    with m.If(~trusted):
                        m.d.comb += stored.eq(1)
                        m.next = "Idle"
            with m.State("Stored"):
                m.d.comb += trust.patches.ready.eq(1)
                with m.If(trust.patches.valid & trust.patches.payload.go):
                    m.d.comb += stored.eq(1)
                    m.next = "Idle"
            with m.State("Hint"):
                m.d.comb += hint.valid.eq(1)
                with m.If(hint.ready):
                    m.next = "Hinted"
            with m.State("Hinted"):
                with m.If(hinted.valid):
                    m.d.comb += [hinted.ready.eq(1), order.r_en.eq(1)]
                    m.d.sync += [
                        candidate.ctx.eq(entry.ctx),
                        candidate.layer.eq(entry.layer),
                        candidate.expert.eq(entry.experts[0]),
                        candidate.score.eq(hinted.payload.value),
                        candidate.source.eq(Source.HINT),
                        candidate.deadline.eq(entry.deadline),
                        candidate_valid.eq(hinted.payload.value >= entry.threshold),
                    ]
                    m.next = "Idle"
                with m.Elif(trust.idle):
                    m.d.comb += order.r_en.eq(1)
                    m.next = "Idle"
        m.d.comb += collecting.eq(~fsm.ongoing("Idle") | candidate_valid)
