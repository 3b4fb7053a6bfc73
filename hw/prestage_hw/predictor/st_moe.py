"""Spatio-temporal predictor (ST-MoE, arXiv 2606.15453)."""

from amaranth import Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, fifo
from amaranth.lib.memory import Memory

from prestage_hw.contract.records import Source
from prestage_hw.layouts import RecordLayout

from .base import Predictor

__all__ = ["StMoePredictor"]

_MOST_CONFIDENCE = 3
_NEW_CONFIDENCE = 2
_HISTORY_WORTH = 2
_THRESHOLD = 2

_VALUE_CONFIDENCE = 16
_VALUE_VALID = 18

#: Decisions, token starts and hints that wait while the predictor works.
_QUEUE_DEPTH = 4


def _index_bits(count):
    """Bits of an index below ``count`` after rounding it up to a power of two; 0 for 1."""
    return (count - 1).bit_length()


class StMoePredictor(Predictor):
    """Predict from the experts that followed in the past and from the previous token's choice.

    Serial: one table entry a cycle. The correlation table is a block RAM of rows (K entries side by
    side), the scores are another of one word an expert, and candidates are ranked through linked
    lists, one for each score.

    With n experts touched, m candidates, and no stall of ``candidates``, a decision takes, from its
    transfer on an idle predictor:

    ======================================= =======================================
    first candidate valid                   at most ``first_candidate_cycles``
    last candidate valid                    at most ``last_candidate_cycles``
    predictor free for the next decision    at most ``decision_cycles``
    ======================================= =======================================

    A queue takes up to 4 decisions, token starts and hints while one is in work; a hint is passed
    on as it is when its turn comes, within 4 cycles on an idle predictor. Clearing takes one cycle
    for each row of the larger table, plus 2.

    Table words of value 0 stand for all invalid correlation entries. A written word whose expert
    does not exist is stored as 0; in the history it also makes its row invalid. Scores saturate at
    3k + 2, which only rows that were written with duplicates could exceed.

    Members
    -------
    As in :class:`PredictorSignature`.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    @property
    def most_score(self):
        """Highest score: k rows of confidence 3 and the history."""
        return _MOST_CONFIDENCE * self.config.model.top_k + _HISTORY_WORTH

    @property
    def most_touched(self):
        """Most experts that one decision touches."""
        k = self.config.model.top_k
        return min(self.config.model.experts, k * self.config.successors + k)

    @property
    def first_candidate_cycles(self):
        """Cycles from the transfer of a decision to its first candidate, at most."""
        k = self.config.model.top_k
        return 4 + k * (self.config.successors + 1) + k + self.most_touched + self.most_score + 7

    @property
    def last_candidate_cycles(self):
        """Cycles from the transfer of a decision to its last candidate, at most, without stalls."""
        return self.first_candidate_cycles + 2 * self.most_touched

    @property
    def decision_cycles(self):
        """Cycles from the transfer of a decision until the predictor is free, without stalls."""
        k = self.config.model.top_k
        return self.last_candidate_cycles + k * (2 * self.config.successors + 3) + 5

    def elaborate(self, platform):
        m = Module()

        model = self.config.model
        layers, experts, top_k = model.layers, model.experts, model.top_k
        successors, contexts = self.config.successors, self.config.contexts
        expert_bits = _index_bits(experts)
        layer_bits = _index_bits(layers)
        successor_bits = _index_bits(successors)
        index_bits = _index_bits(top_k)

        entry_layout = data.StructLayout(
            {"expert": unsigned(expert_bits), "confidence": 2, "valid": 1}
        )
        row_layout = data.ArrayLayout(entry_layout, successors)
        choice_layout = data.ArrayLayout(unsigned(expert_bits), top_k)
        past_layout = data.StructLayout({"experts": choice_layout, "valid": 1})
        score_layout = data.StructLayout({"score": range(self.most_score + 1), "touched": 1})

        # Tables.
        rows = max(1, layers - 1) << expert_bits
        m.submodules.correlation = correlation = Memory(shape=row_layout, depth=rows, init=[])
        row_read, row_write = correlation.read_port(), correlation.write_port()
        pasts = contexts << layer_bits
        m.submodules.history = history = Memory(shape=past_layout, depth=pasts, init=[])
        past_read, past_write = history.read_port(), history.write_port()

        # Scores of the layer to come, and the experts in the order of first touch. Two touches of
        # one expert may follow each other directly.
        m.submodules.scores = scores = Memory(shape=score_layout, depth=experts, init=[])
        score_write = scores.write_port()
        score_read = scores.read_port(transparent_for=(score_write,))
        m.submodules.touched = touched = Memory(shape=expert_bits, depth=experts, init=[])
        touched_read, touched_write = touched.read_port(), touched.write_port()

        # Rank: a list of experts for each score, linked from its first (head) to its last (tail).
        m.submodules.heads = heads = Memory(shape=expert_bits, depth=self.most_score + 1, init=[])
        head_read, head_write = heads.read_port(), heads.write_port()
        m.submodules.tails = tails = Memory(shape=expert_bits, depth=self.most_score + 1, init=[])
        tail_write = tails.write_port()
        tail_read = tails.read_port(transparent_for=(tail_write,))
        m.submodules.links = links = Memory(shape=expert_bits, depth=experts, init=[])
        link_read, link_write = links.read_port(), links.write_port()

        # One queue for decisions, token starts and hints keeps their order. The streams are ready
        # only while nothing waits at its entry, so that what arrives later stays behind. A hint
        # travels as a decision of one expert whose stamp is the deadline.
        decision_layout = RecordLayout("RoutingDecision", config=self.config)
        item_layout = data.StructLayout(
            {"decision": decision_layout, "begin": 1, "hint": 1, "score": 8}
        )
        m.submodules.queue = queue = fifo.SyncFIFOBuffered(
            width=item_layout.size, depth=_QUEUE_DEPTH
        )
        begin_waits, begin_ctx = Signal(), Signal.like(self.begin.payload.ctx)
        decision_waits, decision = Signal(), Signal(decision_layout)
        hint_waits, hint = Signal(), Signal(self.hints.payload.shape())
        clear_waits = Signal()
        clearing = Signal()

        entry = Signal(item_layout)
        m.d.comb += [
            self.begin.ready.eq(
                ~begin_waits & ~decision_waits & ~hint_waits & ~clear_waits & ~clearing
            ),
            self.decisions.ready.eq(self.begin.ready),
            self.hints.ready.eq(self.begin.ready),
            entry.begin.eq(begin_waits),
            entry.decision.eq(decision),
            entry.score.eq(hint.score),
            queue.w_data.eq(entry),
            queue.w_en.eq(begin_waits | decision_waits | hint_waits),
        ]
        with m.If(begin_waits):
            m.d.comb += entry.decision.ctx.eq(begin_ctx)
        with m.Elif(~decision_waits):
            m.d.comb += [
                entry.hint.eq(1),
                entry.decision.ctx.eq(hint.ctx),
                entry.decision.layer.eq(hint.layer),
                entry.decision.experts[0].eq(hint.expert),
                entry.decision.stamp.eq(hint.deadline),
            ]
        with m.If(queue.w_rdy):
            with m.If(begin_waits):
                m.d.sync += begin_waits.eq(0)
            with m.Elif(decision_waits):
                m.d.sync += decision_waits.eq(0)
            with m.Else():
                m.d.sync += hint_waits.eq(0)
        with m.If(self.begin.valid & self.begin.ready):
            m.d.sync += [begin_waits.eq(1), begin_ctx.eq(self.begin.payload.ctx)]
        with m.If(self.decisions.valid & self.decisions.ready):
            m.d.sync += [decision_waits.eq(1), decision.eq(self.decisions.payload)]
        with m.If(self.hints.valid & self.hints.ready):
            m.d.sync += [hint_waits.eq(1), hint.eq(self.hints.payload)]

        # Work registers.
        ctx = Signal.like(begin_ctx)
        layer = Signal.like(decision.layer)
        deadline = Signal(8)
        hint_score = Signal(8)
        chosen = Signal(choice_layout)
        picks = Signal(choice_layout)  # experts to visit, the present one in front
        row = Signal(row_layout)  # the present row, rotated
        row_layer = Signal.like(layer)
        past_layer = Signal.like(layer)
        at = Signal(range(max(successors, top_k)))
        visits = Signal(range(top_k))

        front = row[0]
        past_valid = Signal()
        rest = row.as_value()[entry_layout.size :]
        next_picks = Cat(picks.as_value()[expert_bits:], picks[0])
        last_successor = at == successors - 1
        last_index = at == top_k - 1
        last_visit = visits == top_k - 1

        previous_valid = Signal(contexts)
        previous = [Signal.like(layer, name=f"previous{n}") for n in range(contexts)]
        follows = Signal()
        for n in range(contexts):
            with m.If(ctx == n):
                m.d.comb += follows.eq(previous_valid[n] & (previous[n] + 1 == layer))

        clear_address = Signal(range(max(rows, pasts, experts)))
        row_address = Cat(picks[0], row_layer)
        past_address = Cat(past_layer[:layer_bits], ctx)
        m.d.comb += [
            row_read.addr.eq(row_address),
            row_write.addr.eq(Mux(clearing, clear_address, row_address)),
            row_write.data.eq(Mux(clearing, 0, row.as_value())),
            past_read.addr.eq(past_address),
            past_write.addr.eq(Mux(clearing, clear_address, past_address)),
            past_write.data.experts.eq(Mux(clearing, 0, picks.as_value())),
            past_write.data.valid.eq(~clearing & past_valid),
        ]

        # Accumulate: the score is read in one cycle and written in the next.
        touch, touch_expert, touch_worth = Signal(), Signal(expert_bits), Signal(2)
        add, add_expert, add_worth = Signal(), Signal(expert_bits), Signal(2)
        touches = Signal(range(experts + 1))
        total = Signal(range(self.most_score + _MOST_CONFIDENCE + 1))
        summed = Signal(score_layout)
        m.d.sync += [add.eq(touch), add_expert.eq(touch_expert), add_worth.eq(touch_worth)]
        m.d.comb += [
            score_read.addr.eq(touch_expert),
            total.eq(score_read.data.score + add_worth),
            summed.touched.eq(1),
            summed.score.eq(Mux(total > self.most_score, self.most_score, total)),
            score_write.addr.eq(add_expert),
            score_write.data.eq(summed),
            score_write.en.eq(add),
            touched_write.addr.eq(touches),
            touched_write.data.eq(add_expert),
            touched_write.en.eq(add & ~score_read.data.touched),
        ]
        with m.If(touched_write.en):
            m.d.sync += touches.eq(touches + 1)

        # Rank: touched list, score, tail of the score's list, append; one expert a cycle.
        ranks = Signal.like(touches)
        look, grade, append = Signal(), Signal(), Signal()
        grade_expert, append_expert = Signal(expert_bits), Signal(expert_bits)
        append_score = Signal(range(self.most_score + 1))
        filled = Signal(self.most_score + 1)
        score = Signal.like(append_score)
        expert, last_expert = Signal(expert_bits), Signal(expert_bits)
        m.d.sync += [
            grade.eq(look),
            grade_expert.eq(touched_read.data),
            append.eq(grade & (score_read.data.score >= _THRESHOLD)),
            append_expert.eq(grade_expert),
            append_score.eq(score_read.data.score),
        ]
        append_first = ~filled.bit_select(append_score, 1)
        m.d.comb += [
            touched_read.addr.eq(ranks),
            tail_read.addr.eq(Mux(grade, score_read.data.score, score)),
            head_read.addr.eq(score),
            head_write.addr.eq(append_score),
            head_write.data.eq(append_expert),
            head_write.en.eq(append & append_first),
            link_read.addr.eq(expert),
            link_write.addr.eq(tail_read.data),
            link_write.data.eq(append_expert),
            link_write.en.eq(append & ~append_first),
            tail_write.addr.eq(append_score),
            tail_write.data.eq(append_expert),
            tail_write.en.eq(append),
        ]
        with m.If(look):
            m.d.comb += score_read.addr.eq(touched_read.data)
        with m.If(grade):
            m.d.comb += [
                score_write.addr.eq(grade_expert),
                score_write.data.eq(0),
                score_write.en.eq(1),
            ]
        with m.If(append):
            m.d.sync += filled.eq(filled | (1 << append_score))
            with m.If(append_score > score):
                m.d.sync += score.eq(append_score)

        # Learn: compare the row's front entry with the whole choice.
        used, opened = Signal(top_k), Signal(successors)
        matches, hit, opens = Signal(top_k), Signal(), Signal()
        turned = Signal(entry_layout)
        all_used = used.all()
        m.d.comb += [
            matches.eq(Cat((chosen[i] == front.expert) & front.valid for i in range(top_k))),
            hit.eq(matches.any()),
            opens.eq(~hit & ~(front.valid & (front.confidence != 0))),
            turned.eq(front),
        ]
        next_used = used | matches
        next_opened = Cat(opened[1:], opens)

        # Table port: one word at a time, while nothing else is to do.
        quiet = ~begin_waits & ~decision_waits & ~hint_waits & (queue.level == 0)
        request = self.table_requests.payload
        of_row = request.word[:successor_bits]
        of_source = request.word[successor_bits:][:expert_bits]
        of_pair = request.word[successor_bits + expert_bits :]
        of_past, of_layer = request.word[:index_bits], request.word[index_bits:][:layer_bits]
        of_ctx = request.word[index_bits + layer_bits :]
        known, is_history, write = Signal(), Signal(), Signal()
        value = Signal(_VALUE_VALID + 1)
        position = Signal.like(at)
        found = Signal(_VALUE_VALID + 1)
        exists = value[:_VALUE_CONFIDENCE] < experts

        words = Signal(24)
        with m.Switch(self.table_select):
            with m.Case(0):
                m.d.comb += words.eq((layers - 1) << (expert_bits + successor_bits))
            with m.Case(1):
                m.d.comb += words.eq(contexts << (layer_bits + index_bits))
        m.d.sync += self.table_words.eq(words)

        with m.If(self.candidates.ready):
            m.d.sync += self.candidates.valid.eq(0)
        with m.If(self.table_values.ready):
            m.d.sync += self.table_values.valid.eq(0)

        with m.FSM(init="Clear") as fsm:
            with m.State("Clear"):
                m.d.comb += [
                    row_write.en.eq(clear_address < rows),
                    past_write.en.eq(clear_address < pasts),
                    score_write.addr.eq(clear_address),
                    score_write.data.eq(0),
                    score_write.en.eq(clear_address < experts),
                ]
                m.d.sync += [clear_address.eq(clear_address + 1), previous_valid.eq(0)]
                with m.If(clear_address == max(rows, pasts, experts) - 1):
                    m.d.sync += clear_address.eq(0)
                    m.next = "Idle"

            with m.State("Idle"):
                item = data.View(item_layout, queue.r_data)
                m.d.sync += [at.eq(0), visits.eq(0), touches.eq(0), ranks.eq(0)]
                m.d.sync += [filled.eq(0), score.eq(0)]
                with m.If(queue.r_rdy):
                    m.d.comb += queue.r_en.eq(1)
                    m.d.sync += [
                        ctx.eq(item.decision.ctx),
                        layer.eq(item.decision.layer),
                        deadline.eq(Mux(item.hint, item.decision.stamp, item.decision.stamp + 1)),
                        hint_score.eq(item.score),
                        row_layer.eq(item.decision.layer),
                        past_layer.eq(item.decision.layer + 1),
                    ]
                    for i in range(top_k):
                        m.d.sync += [
                            chosen[i].eq(item.decision.experts[i]),
                            picks[i].eq(item.decision.experts[i]),
                        ]
                    with m.If(item.begin):
                        for n in range(contexts):
                            with m.If(item.decision.ctx == n):
                                m.d.sync += previous_valid[n].eq(0)
                    with m.Elif(item.hint):
                        m.next = "Pass on"
                    with m.Elif(item.decision.layer == layers - 1):
                        m.next = "Recall"
                    with m.Else():
                        m.next = "Fetch"
                with m.Elif(quiet & clear_waits):
                    m.d.sync += clear_waits.eq(0)
                    m.next = "Clear"
                with m.Else():
                    m.d.comb += self.table_requests.ready.eq(quiet)
                    with m.If(self.table_requests.valid & quiet):
                        m.d.sync += [
                            write.eq(request.write),
                            value.eq(request.value),
                            is_history.eq(request.table == 1),
                        ]
                        m.next = "Table fetch"
                    with m.If(request.table == 1):
                        m.d.sync += [
                            known.eq((of_past < top_k) & (of_layer < layers) & (of_ctx < contexts)),
                            position.eq(of_past),
                            past_layer.eq(of_layer),
                            ctx.eq(of_ctx),
                        ]
                    with m.Else():
                        m.d.sync += [
                            known.eq(
                                (request.table == 0)
                                & (of_row < successors)
                                & (of_source < experts)
                                & (of_pair < layers - 1)
                            ),
                            position.eq(of_row),
                            picks[0].eq(of_source),
                            row_layer.eq(of_pair),
                        ]

            with m.State("Pass on"):
                with m.If(~self.candidates.valid | self.candidates.ready):
                    m.d.sync += [
                        self.candidates.valid.eq(1),
                        self.candidates.payload.ctx.eq(ctx),
                        self.candidates.payload.layer.eq(layer),
                        self.candidates.payload.expert.eq(picks[0]),
                        self.candidates.payload.score.eq(hint_score),
                        self.candidates.payload.source.eq(Source.HINT),
                        self.candidates.payload.deadline.eq(deadline),
                    ]
                    m.next = "Idle"

            # Predict.
            with m.State("Fetch"):
                m.next = "Load"
            with m.State("Load"):
                # From here the next row's address is applied.
                m.d.sync += [row.eq(row_read.data), picks.eq(next_picks)]
                m.next = "Sum"
            with m.State("Sum"):
                m.d.comb += [
                    touch.eq(front.valid),
                    touch_expert.eq(front.expert),
                    touch_worth.eq(front.confidence),
                ]
                m.d.sync += [row.eq(Cat(rest, front)), at.eq(at + 1)]
                with m.If(last_successor):
                    m.d.sync += [at.eq(0), visits.eq(visits + 1)]
                    m.next = "Load"
                    with m.If(last_visit):
                        m.d.sync += visits.eq(0)
                        m.next = "Load past"
            with m.State("Load past"):
                m.d.sync += picks.eq(past_read.data.experts)
                m.next = "Settle"
                with m.If(past_read.data.valid):
                    m.next = "Sum past"
            with m.State("Sum past"):
                m.d.comb += [
                    touch.eq(1),
                    touch_expert.eq(picks[0]),
                    touch_worth.eq(_HISTORY_WORTH),
                ]
                m.d.sync += [picks.eq(next_picks), at.eq(at + 1)]
                with m.If(last_index):
                    m.d.sync += at.eq(0)
                    m.next = "Settle"
            with m.State("Settle"):
                m.next = "Rank"
            with m.State("Rank"):
                m.d.sync += look.eq(ranks != touches)
                with m.If(ranks != touches):
                    m.d.sync += ranks.eq(ranks + 1)
                with m.Elif(~look & ~grade):
                    m.next = "Walk"
            with m.State("Walk"):
                with m.If(score < _THRESHOLD):
                    m.next = "Recall"
                with m.Elif(filled.bit_select(score, 1)):
                    m.next = "Head"
                with m.Else():
                    m.d.sync += score.eq(score - 1)
            with m.State("Head"):
                m.d.sync += [expert.eq(head_read.data), last_expert.eq(tail_read.data)]
                m.next = "Propose"
            with m.State("Propose"):
                with m.If(~self.candidates.valid | self.candidates.ready):
                    m.d.sync += [
                        self.candidates.valid.eq(1),
                        self.candidates.payload.ctx.eq(ctx),
                        self.candidates.payload.layer.eq(past_layer),
                        self.candidates.payload.expert.eq(expert),
                        self.candidates.payload.score.eq(score),
                        self.candidates.payload.source.eq(Source.PREDICTOR),
                        self.candidates.payload.deadline.eq(deadline),
                    ]
                    m.next = "Link"
                    with m.If(expert == last_expert):
                        m.d.sync += score.eq(score - 1)
                        m.next = "Walk"
            with m.State("Link"):
                m.d.sync += expert.eq(link_read.data)
                m.next = "Propose"

            # Learn.
            with m.State("Recall"):
                m.d.sync += [past_layer.eq(layer - 1), row_layer.eq(layer - 1)]
                m.next = "Recall fetch"
                with m.If(~follows):
                    m.d.sync += past_layer.eq(layer)
                    m.next = "Remember"
            with m.State("Recall fetch"):
                m.next = "Recall load"
            with m.State("Recall load"):
                m.d.sync += [picks.eq(past_read.data.experts), past_layer.eq(layer)]
                m.next = "Remember"
                with m.If(past_read.data.valid):
                    m.next = "Learn fetch"
            with m.State("Learn fetch"):
                m.next = "Learn load"
            with m.State("Learn load"):
                m.d.sync += [row.eq(row_read.data), used.eq(0)]
                m.next = "Judge"
            with m.State("Judge"):
                with m.If(hit):
                    m.d.comb += turned.confidence.eq(
                        Mux(
                            front.confidence == _MOST_CONFIDENCE,
                            _MOST_CONFIDENCE,
                            front.confidence + 1,
                        )
                    )
                with m.Elif(~opens):
                    m.d.comb += turned.confidence.eq(front.confidence - 1)
                m.d.sync += [
                    row.eq(Cat(rest, turned)),
                    used.eq(next_used),
                    opened.eq(next_opened),
                    at.eq(at + 1),
                ]
                with m.If(last_successor):
                    m.d.sync += at.eq(0)
                    m.next = "Replace"
                    with m.If(~next_opened.any() | next_used.all()):
                        m.next = "Store"
            with m.State("Replace"):
                with m.If(opened[0] & ~all_used):
                    m.d.comb += [turned.confidence.eq(_NEW_CONFIDENCE), turned.valid.eq(1)]
                    m.d.sync += used.eq(used | (used + 1))  # sets the lowest bit that is clear
                    for i in reversed(range(top_k)):
                        with m.If(~used[i]):
                            m.d.comb += turned.expert.eq(chosen[i])
                m.d.sync += [
                    row.eq(Cat(rest, turned)),
                    opened.eq(Cat(opened[1:], opened[0])),
                    at.eq(at + 1),
                ]
                with m.If(last_successor):
                    m.d.sync += at.eq(0)
                    m.next = "Store"
            with m.State("Store"):
                m.d.comb += row_write.en.eq(1)
                m.d.sync += [picks.eq(next_picks), visits.eq(visits + 1)]
                m.next = "Learn fetch"
                with m.If(last_visit):
                    m.d.sync += visits.eq(0)
                    m.next = "Remember"
            with m.State("Remember"):
                m.d.comb += [
                    past_write.en.eq(1),
                    past_write.data.experts.eq(chosen),
                    past_write.data.valid.eq(1),
                ]
                for n in range(contexts):
                    with m.If(ctx == n):
                        m.d.sync += [previous[n].eq(layer), previous_valid[n].eq(1)]
                m.next = "Idle"

            # Tables: the row turns once around, so that each entry passes the front.
            with m.State("Table fetch"):
                m.next = "Table load"
            with m.State("Table load"):
                m.d.sync += [
                    row.eq(row_read.data),
                    past_valid.eq(past_read.data.valid),
                    found.eq(0),
                ]
                with m.If(is_history):
                    m.d.sync += picks.eq(past_read.data.experts)
                with m.If(known):
                    m.next = "Table turn"
                with m.Elif(write):
                    m.next = "Idle"
                with m.Else():
                    m.next = "Table answer"
            with m.State("Table turn"):
                m.d.sync += at.eq(at + 1)
                with m.If(is_history):
                    m.d.sync += picks.eq(next_picks)
                    with m.If(at == position):
                        m.d.sync += found.eq(picks[0] | (past_valid << _VALUE_VALID))
                        with m.If(write):
                            m.d.sync += picks[top_k - 1].eq(Mux(exists, value[:expert_bits], 0))
                            with m.If(~exists):
                                m.d.sync += past_valid.eq(0)
                            with m.Elif(position == 0):
                                m.d.sync += past_valid.eq(value[_VALUE_VALID])
                with m.Else():
                    with m.If(at == position):
                        m.d.sync += found.eq(
                            front.expert
                            | (front.confidence << _VALUE_CONFIDENCE)
                            | (front.valid << _VALUE_VALID)
                        )
                        with m.If(write):
                            m.d.comb += turned.eq(0)
                            with m.If(exists & value[_VALUE_VALID]):
                                m.d.comb += [
                                    turned.expert.eq(value[:expert_bits]),
                                    turned.confidence.eq(value[_VALUE_CONFIDENCE:]),
                                    turned.valid.eq(1),
                                ]
                    m.d.sync += row.eq(Cat(rest, turned))
                with m.If(Mux(is_history, last_index, last_successor)):
                    m.d.sync += at.eq(0)
                    m.next = "Table answer"
                    with m.If(write):
                        m.next = "Table store"
            with m.State("Table store"):
                m.d.comb += [row_write.en.eq(~is_history), past_write.en.eq(is_history)]
                m.next = "Idle"
            with m.State("Table answer"):
                with m.If(~self.table_values.valid | self.table_values.ready):
                    m.d.sync += [
                        self.table_values.valid.eq(1),
                        self.table_values.payload.eq(found),
                    ]
                    m.next = "Idle"

        with m.If(self.clear):
            m.d.sync += clear_waits.eq(1)

        m.d.comb += [
            clearing.eq(fsm.ongoing("Clear")),
            self.idle.eq(
                fsm.ongoing("Idle")
                & quiet
                & ~clear_waits
                & ~self.candidates.valid
                & ~self.table_values.valid
            ),
        ]
        return m
