"""A second, plain event loop for the tests: one link, LRU, candidates in a list.

It shares nothing with the simulator: time is in fractions, the recency order is a list, and each
rule is written down once more from ``docs/simulator.md``.
"""

from fractions import Fraction

from prestage_hw.contract.benefit import CONFIDENCE_STEPS


class Fetch:
    def __init__(self, key, demand, deadline, tiles):
        self.key, self.demand, self.deadline, self.left = key, demand, deadline, tiles
        self.end = Fraction(0)
        self.given_up = False


class Witness:
    """Replays visits of layers, each with the experts it wants."""

    def __init__(self, *, slots, layers, k, rho, alpha=Fraction(1, 2), tiles=8, latency=0, most=2):
        self.slots, self.layers, self.k, self.tiles, self.most = slots, layers, k, tiles, most
        self.alpha, self.latency = alpha, latency
        self.tile = Fraction(rho) / k / tiles
        self.now = self.free = Fraction(0)
        self.order = []  # keys in slots, least recent first; None is a slot that was given up
        self.filling = {}  # key to its fetch
        self.pinned, self.touched, self.unused = set(), set(), set()
        self.demands, self.prefetches = [], []
        self.waiting = []  # candidates: (key, score, deadline), in the order of arrival
        self.routes = 0
        self.counts = dict.fromkeys(
            ("demands", "hits", "misses", "late", "issued", "useful", "cancelled", "tiles_moved"), 0
        )

    def take_slot(self, key, *, prefetch):
        if len(self.order) < self.slots:
            self.order.append(key)
            return True
        for at, other in enumerate(self.order):
            if prefetch and other in self.touched:
                return False
            if other not in self.pinned and other not in self.filling:
                self.unused.discard(other)
                del self.order[at]
                self.order.append(key)
                return True
        return False

    def next_fetch(self):
        self.sweep()
        if self.demands:
            return self.demands[0]
        while sum(not f.demand for f in self.filling.values()) < self.most and self.waiting:
            self.waiting = [c for c in self.waiting if c[2] > self.routes]
            if not self.waiting:
                break
            best = min(self.waiting, key=lambda c: c[2] - self.routes + CONFIDENCE_STEPS[c[1]])
            self.waiting.remove(best)
            key, _, deadline = best
            if key in self.order or not self.take_slot(key, prefetch=True):
                continue
            self.touched.add(key)
            self.unused.add(key)
            self.counts["issued"] += 1
            fetch = self.filling[key] = Fetch(key, False, deadline, self.tiles)
            self.prefetches.append(fetch)
        return next((f for f in self.prefetches if not f.given_up), None)

    def sweep(self):
        for fetch in list(self.prefetches):
            if fetch.given_up and fetch.end <= self.now:
                self.prefetches.remove(fetch)
                del self.filling[fetch.key]
                self.order.remove(fetch.key)
                self.unused.discard(fetch.key)
                self.touched.discard(fetch.key)
                self.counts["cancelled"] += 1

    def arrive(self, until):
        """Arrivals by then, each at its time."""
        return sorted(
            (f for f in self.filling.values() if not f.left and f.end <= until), key=lambda f: f.end
        )

    def work(self, until, wanted=()):
        """Let the link work until then, or until one of the wanted has arrived; the moment."""
        self.free = max(self.free, self.now)
        while True:
            come = self.arrive(min(until, self.free) if until is not None else self.free)
            if come:
                self.now = max(self.now, come[0].end)
                for fetch in come:
                    if fetch.end == come[0].end:
                        del self.filling[fetch.key]
                        self.arrived[fetch.key] = fetch.end
                if any(f.key in wanted and f.end == come[0].end for f in come):
                    return
                continue
            if until is not None and self.free >= until:
                self.now = until
                return
            self.now = self.free
            fetch = self.next_fetch()
            if fetch is None:
                later = [f.end for f in self.filling.values() if f.end > self.free]
                later += [] if until is None else [until]
                self.free = min(later)
                continue
            fetch.left -= 1
            self.free += self.tile
            fetch.end = self.free + self.latency
            self.counts["tiles_moved"] += 1
            if not fetch.left:
                (self.demands if fetch.demand else self.prefetches).remove(fetch)

    def visit(self, layer, wanted, offered):
        """A layer: ``offered`` are the candidates (key, score, layers ahead) once it is routed."""
        self.arrived = {}
        self.work(self.now + self.alpha)
        self.routes += 1
        self.touched = set()
        gate, count = self.now, self.counts
        waits = []
        for expert in wanted:
            key = layer, expert
            count["demands"] += 1
            if key in self.order:
                self.order.remove(key)
                self.order.append(key)
                fetch = self.filling.get(key)
                if key in self.unused:
                    count["useful"] += 1
                    self.unused.discard(key)
                if fetch is None:
                    count["hits"] += 1
                else:
                    count["late"] += 1
                    fetch.demand, fetch.given_up = True, False
                    if fetch in self.prefetches:
                        self.prefetches.remove(fetch)
                        self.demands.append(fetch)
                    waits.append(key)
            else:
                assert self.take_slot(key, prefetch=False)
                count["misses"] += 1
                fetch = self.filling[key] = Fetch(key, True, 0, self.tiles)
                self.demands.append(fetch)
                waits.append(key)
            self.touched.add(key)
            self.pinned.add(key)
        for fetch in self.prefetches:
            fetch.given_up = fetch.given_up or fetch.deadline <= self.routes
        self.sweep()
        self.offer(offered)
        each = (1 - self.alpha) / self.k
        done = gate + each * (len(wanted) - len(waits))
        while waits:
            come = [key for key in waits if key in self.arrived]
            if not come:
                self.work(None, waits)
                continue
            first = min(come, key=lambda key: self.arrived[key])
            waits.remove(first)
            done = max(done, self.arrived[first]) + each
        self.work(max(done, self.now))
        self.pinned.clear()

    def offer(self, offered):
        for key, score, ahead in offered:
            self.waiting.append((key, score, self.routes + ahead))
