"""The driver with a copier, on compiled RTL against the golden model.

::

    routes ─▶ Device ─▶ sim://    ─▶ FETCH ─▶ copier ─▶ slots (NumPy)
         └──▶ Device ─▶ model://  ─▶ the same
"""

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest

import prestage
from prestage.errors import BusError
from prestage_hw.contract import DeviceConfig, preset
from prestage_hw.contract.pattern import expert_memory
from prestage_hw.contract.records import HOST_MESSAGES
from prestage_hw.contract.registers import COUNTERS
from prestage_tb.coverage import hit

CONFIG = DeviceConfig(
    model=preset("tiny"), slots=8, expert_bytes=1024, contexts=2, mover="host", predictor="st_moe"
)
DEVICES = ("model://", "sim://")
#: How futures end on which device.
FUTURES = [f"{how} {url}" for how in ("threads", "reverse", "cancelled") for url in DEVICES]
COMPARED = [c.name for c in COUNTERS if not c.name.startswith("link_")]


class Host:
    """Experts in one array, slots in another, and what was copied."""

    def __init__(self, config=CONFIG):
        self.config = config
        model = config.model
        self.weights = expert_memory(config).reshape(model.layers, model.experts, -1)
        self.slots = np.zeros((config.slots, config.expert_bytes), np.uint8)
        self.broken = set()
        self.calls = []

    def copy(self, layer, expert, slot, tile, nbytes, demand):
        self.calls.append((layer, expert, slot, tile, demand))
        if (layer, expert) in self.broken:
            raise OSError(f"expert {expert} of layer {layer} is gone")
        part = slice(tile * nbytes, (tile + 1) * nbytes)
        self.slots[slot, part] = self.weights[layer, expert, part]

    def check(self, ready):
        np.testing.assert_array_equal(
            self.slots[ready.slot], self.weights[ready.layer, ready.expert]
        )


def arrive(device, host, ctx, layer):
    """Wait for all experts and check their bytes: the errors that came."""
    errors = []
    while True:
        try:
            for ready in device.wait_ready(ctx, layer):
                host.check(ready)
            return errors
        except BusError as error:
            errors.append(error)


def walk(device, host, *, tokens, seed, drain):
    """Random routes with reuse; every expert is checked. The errors that came, as text."""
    rng = random.Random(seed)
    model = CONFIG.model
    favourites = [rng.sample(range(model.experts), model.top_k) for _ in range(model.layers)]
    errors = []
    for token in range(tokens):
        ctx = rng.randrange(CONFIG.contexts)
        device.begin_token(ctx, token)
        for layer in range(model.layers):
            if rng.random() < 0.4:
                favourites[layer] = rng.sample(range(model.experts), model.top_k)
            device.route(ctx, layer, favourites[layer])
            for error in arrive(device, host, ctx, layer):
                assert (error.layer, error.expert) in host.broken
                assert isinstance(error.__cause__, OSError), error.__cause__
                errors.append(str(error))
            device.release(ctx, layer)
            if drain:
                device.drain()
    return errors


@pytest.mark.parametrize("broken", [(), ((0, 3), (2, 5), (3, 1))], ids=["good", "broken"])
def test_same_on_either_device(broken):
    outcomes = []
    for url in DEVICES:
        host = Host()
        host.broken = set(broken)
        with prestage.open(url, config=CONFIG, copier=host.copy) as device:
            # One candidate at a time: what a failing copy frees is taken next.
            device.configure(settle=True)
            errors = walk(device, host, tokens=15, seed=3, drain=True)
            stats = device.stats()
            outcomes.append(({name: stats[name] for name in COMPARED}, sorted(errors)))
            assert device.copying == 0
    assert outcomes[0] == outcomes[1]
    counters, errors = outcomes[0]
    assert counters["fills"] > 30 and counters["prefetch_issued"] > 10 and counters["hits"] > 10
    assert bool(errors) == bool(broken) == bool(counters["fill_errors"])
    hit("mover.same", "broken" if broken else "good", of=("good", "broken"))


@pytest.mark.parametrize("url", DEVICES)
def test_futures_that_end_in_any_order(url):
    host = Host()
    host.broken = {(1, 2), (3, 7)}
    rng = random.Random(5)
    lock = threading.Lock()
    most = 0
    running = 0

    def slow(*fetch):
        nonlocal most, running
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(rng.random() * 0.003)
        try:
            host.copy(*fetch)
        finally:
            with lock:
                running -= 1

    with ThreadPoolExecutor(4) as pool:
        submit = lambda *fetch: pool.submit(slow, *fetch)  # noqa: E731
        with prestage.open(url, config=CONFIG, copier=submit) as device:
            errors = walk(device, host, tokens=8, seed=8, drain=False)
            device.drain()
            stats = device.stats()
            assert device.copying == 0
    assert errors and most > 1
    assert stats["rejected"] == 0
    assert stats["hits"] + stats["misses"] + stats["late"] + stats["merged"] == stats["demands"]
    hit("mover.futures", f"threads {url}", of=FUTURES)


@pytest.mark.parametrize("url", DEVICES)
def test_one_copy_holds_up_no_other(url):
    """The demands of a route are asked for together, and may end in reverse."""
    host = Host()
    futures = {}

    def later(layer, expert, slot, tile, nbytes, demand):
        future = Future()
        futures.setdefault((layer, expert), []).append((future, slot, tile))
        if len(futures) == CONFIG.model.top_k and tile == CONFIG.tiles - 1:
            for key in reversed(list(futures)):
                for pending, at, part in futures[key]:
                    host.copy(*key, at, part, nbytes, demand)
                    pending.set_result(None)
            futures.clear()
        return future

    with prestage.open(url, config=CONFIG, copier=later) as device:
        device.configure(prefetch=False)
        device.route(0, 0, [3, 5])
        assert not arrive(device, host, 0, 0)
        order = [call[1] for call in host.calls if call[3] == 0]
        assert order == [5, 3]
        device.release(0, 0)
        device.drain()
    hit("mover.futures", f"reverse {url}", of=FUTURES)


@pytest.mark.parametrize("url", DEVICES)
def test_cancelled_future(url):
    """What is cancelled has failed; the expert is fetched again for the next demand."""
    host = Host()
    cancelled = []

    def copier(*fetch):
        if fetch[1] == 4 and not cancelled:
            future = Future()
            cancelled.append(future)
            future.cancel()
            future.set_running_or_notify_cancel()
            return future
        return host.copy(*fetch)

    with prestage.open(url, config=CONFIG, copier=copier) as device:
        device.configure(prefetch=False)
        device.route(0, 1, [4, 6])
        (error,) = arrive(device, host, 0, 1)
        assert error.expert == 4 and type(error.__cause__).__name__ == "CancelledError"
        device.release(0, 1)
        device.route(0, 1, [4, 6])
        assert not arrive(device, host, 0, 1)
    hit("mover.futures", f"cancelled {url}", of=FUTURES)


@pytest.mark.parametrize("url", DEVICES)
def test_many_messages_without_waiting(url):
    """The driver waits by itself where the device would have no room."""
    host = Host()
    with prestage.open(url, config=CONFIG, copier=host.copy) as device:
        device.configure(hints=True)
        for token in range(6 * HOST_MESSAGES):
            ctx = token % 2
            device.begin_token(ctx, token)
            device.hint(ctx, 1, token % 8)
        for ctx in range(2):
            device.route(ctx, 0, [1, 2])
            for _ in range(HOST_MESSAGES):
                device.hint(ctx, 2, 5)
            assert not arrive(device, host, ctx, 0)
            device.release(ctx, 0)
        device.drain()
        assert device.stats()["rejected"] == 0
        assert device.unclaimed == ()
    assert any(not demand for *_, demand in host.calls)
    hit("mover.driver_flood", url, of=DEVICES)


def test_prefetches_while_a_clock_runs():
    """run() serves fetches, so that the next layer's experts are there."""
    host = Host()
    with prestage.open("sim://", config=CONFIG, copier=host.copy) as device:
        device.configure(hints=True, prefetch=False)
        device.begin_token(0, 1)
        device.hint(0, 0, 6)
        device.flush()
        device.run(6000)
        assert {call[1] for call in host.calls} == {6}
        device.route(0, 0, [6, 1])
        assert not arrive(device, host, 0, 0)
        assert device.counters("hits", "misses") == (1, 1)


def test_slow_copies_are_waited_for_in_real_time():
    """A time-out counts microseconds of the host's while copies are under way."""
    never = Future()
    with prestage.open("sim://", config=CONFIG, copier=lambda *fetch: never) as device:
        device.route(0, 0, [1, 2])
        with pytest.raises(prestage.errors.DeviceTimeoutError, match=r"still waits for .*\[1, 2\]"):
            list(device.wait_ready(0, 0, timeout=50_000))
        assert device.copying == 2 * CONFIG.tiles
    assert never.cancelled()


class Gate:
    """A copier of futures: demands are copied at once, prefetches when they are let through."""

    def __init__(self, host):
        self.host = host
        self.asked = []  # (layer, expert, slot, tile, nbytes, demand), in the order of the calls
        self.held = []  # prefetches that were not let through: the call and its future

    def __call__(self, *fetch):
        self.asked.append(fetch)
        future = Future()
        if fetch[-1]:
            self.host.copy(*fetch)
            future.set_result(None)
        else:
            self.held.append((fetch, future))
        return future

    def open(self, *, least=1):
        """Let all prefetches end that wait."""
        assert len(self.held) >= least
        held, self.held = self.held, []
        for fetch, future in held:
            self.host.copy(*fetch)
            future.set_result(None)

    def tiles(self, layer, expert):
        """Tiles that were asked for, and whether as demands."""
        return [(fetch[3], fetch[5]) for fetch in self.asked if fetch[:2] == (layer, expert)]


def until(device, condition):
    """Let the device go on until something has come true."""
    for _ in range(200):
        if device.simulated.clocked:
            device.run(100)
        device.flush()
        if condition():
            return
    raise AssertionError("it never comes true")


@contextmanager
def gated(url, config=CONFIG, **settings):
    """A device whose prefetches come from hints only, and end when the test lets them."""
    host = Host(config)
    gate = Gate(host)
    with prestage.open(url, config=config, copier=gate) as device:
        device.configure(hints=True, prefetch=False, cancel=False, **settings)
        device.begin_token(0, 1)
        yield device, gate, host
        gate.open(least=0)


def hint(device, gate, layer, *experts):
    """Hint experts, until the first of them is being copied."""
    for expert in experts:
        device.hint(0, layer, expert)
    until(device, lambda: gate.held)


@pytest.mark.parametrize("url", DEVICES)
def test_demands_do_not_wait_for_prefetches(url):
    """A layer's experts are ready while a prefetch is being copied, and goes on being."""
    with gated(url) as (device, gate, host):
        hint(device, gate, 3, 6)
        for layer in range(3):
            device.route(0, layer, [1, 2])
            assert not arrive(device, host, 0, layer)
            device.release(0, layer)
        assert device.copying == 1 and device.counters("fills") == (6,)
        # It has come by the time that its layer does.
        for tile in range(CONFIG.tiles):
            until(device, lambda: len(gate.tiles(3, 6)) == tile + 1)  # noqa: B023
            gate.open()
        device.drain()
        device.route(0, 3, [6, 1])
        assert not arrive(device, host, 0, 3)
        assert device.counters("hits", "useful", "late", "misses") == (1, 1, 0, 7)
        assert gate.tiles(3, 6) == [(tile, False) for tile in range(CONFIG.tiles)]
        hit("mover.overlap")


@pytest.mark.parametrize("url", DEVICES)
def test_demand_takes_a_prefetch_over(url):
    """What is left of it goes out as a demand, what is under way is waited for."""
    with gated(url) as (device, gate, host):
        hint(device, gate, 1, 6)
        device.route(0, 1, [6, 4])
        arrived = device.wait_ready(0, 1)
        # The other one doesn't wait.
        ready = next(arrived)
        assert ready.expert == 4
        host.check(ready)
        assert device.copying == 1
        until(device, lambda: len(gate.tiles(1, 6)) == CONFIG.tiles)
        assert gate.tiles(1, 6) == [(0, False)] + [(tile, True) for tile in range(1, CONFIG.tiles)]
        # A second context joins it.
        device.route(1, 1, [6, 4])
        others = device.wait_ready(1, 1)
        assert next(others).expert == 4
        gate.open()
        for each in (arrived, others):
            (ready,) = each
            assert ready.expert == 6
            host.check(ready)
        names = ("late", "merged", "misses", "hits", "useful", "fills")
        assert device.counters(*names) == (1, 1, 1, 1, 1, 2)
        stats = device.stats()
        assert stats["demand_bytes"] == (2 * CONFIG.tiles - 1) * CONFIG.tile_bytes
        assert stats["prefetch_bytes"] == CONFIG.tile_bytes
        hit("mover.promoted")


@pytest.mark.parametrize("url", DEVICES)
def test_prefetch_is_given_up_at_a_tile(url):
    """Its layer was routed without it: no more tiles, and its slot is free after the last one."""
    with gated(url) as (device, gate, host):
        device.configure(cancel=True)
        hint(device, gate, 1, 6)
        ((_, _, slot, *_), _) = gate.held[0]
        device.route(0, 1, [1, 2])
        assert not arrive(device, host, 0, 1)
        # Nobody is given the slot while the host may still write to it.
        for layer in (2, 3):
            device.route(0, layer, [layer, layer + 2])
            assert not arrive(device, host, 0, layer)
            device.release(0, layer)
        device.route(1, 0, [6, 7])
        assert not arrive(device, host, 1, 0)
        assert all(fetch[2] != slot for fetch in gate.asked[1:])
        assert device.counters("prefetch_cancelled") == (0,)
        gate.open()
        until(device, lambda: not device.copying)
        device.drain()
        assert gate.tiles(1, 6) == [(0, False)]
        assert device.counters("prefetch_cancelled", "fill_errors") == (1, 0)
        # It is the next to be taken; its expert is fetched anew.
        device.release(0, 1)
        device.route(0, 1, [6, 1])
        assert not arrive(device, host, 0, 1)
        assert gate.asked[-1][2] == slot and gate.tiles(1, 6)[1:] == [(0, True), (1, True)]
        hit("mover.given_up")


@pytest.mark.parametrize("url", DEVICES)
def test_prefetch_that_was_given_up_is_demanded(url):
    """Another context comes for it while its last tile is under way: the rest follows."""
    with gated(url) as (device, gate, host):
        device.configure(cancel=True)
        hint(device, gate, 1, 6)
        device.route(0, 1, [1, 2])
        assert not arrive(device, host, 0, 1)
        until(device, lambda: True)
        device.route(1, 1, [6, 1])
        arrived = device.wait_ready(1, 1)
        assert next(arrived).expert == 1
        gate.open()
        (ready,) = arrived
        host.check(ready)
        assert device.counters("late", "prefetch_cancelled", "useful") == (1, 0, 1)
        assert gate.tiles(1, 6) == [(0, False), (1, True)]
        hit("mover.given_up")


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize("url", DEVICES)
def test_few_prefetch_tiles_leave_ahead_of_demands(url, tiles):
    """No more than ``prefetch_tiles`` of them are with the host, whatever is hinted."""
    with gated(url, prefetch_tiles=tiles) as (device, gate, host):
        hint(device, gate, 2, 5, 6, 7)
        until(device, lambda: len(gate.held) == tiles)
        for _ in range(4):
            until(device, lambda: True)
            assert len(gate.held) == tiles
        device.route(0, 0, [1, 2])
        assert not arrive(device, host, 0, 0)
        assert [fetch[-1] for fetch in gate.asked] == tiles * [False] + 2 * CONFIG.tiles * [True]
        for _ in range(2):
            before = len(gate.asked)
            gate.open(least=tiles)
            until(device, lambda: len(gate.held) == min(tiles, 10 - before))  # noqa: B023
        while len(gate.asked) < 5 * CONFIG.tiles or gate.held:
            gate.open(least=0)
            until(device, lambda: True)
        device.drain()
        assert device.counters("prefetch_issued", "fills") == (3, 5)
        hit("mover.order")


def test_demand_waits_for_a_slot():
    """All other slots are held: the demand gets that of a prefetch, once it has come."""
    with gated("model://", CONFIG.replace(slots=4)) as (device, gate, host):
        device.route(1, 0, [1, 2])
        assert not arrive(device, host, 1, 0)
        hint(device, gate, 1, 6)
        device.route(0, 0, [1, 3])
        assert not arrive(device, host, 0, 0)
        device.route(0, 1, [0, 4])
        arrived = device.wait_ready(0, 1)
        with pytest.raises(prestage.errors.DeviceTimeoutError):
            next(device.wait_ready(0, 1, timeout=1000))
        assert device.counters("misses", "refused") == (3, 0)
        # Its tiles go on; then it gives way to the first demand. There is no slot for the other.
        gate.open()
        until(device, lambda: gate.held)
        gate.open()
        ready = next(arrived)
        assert ready.expert == 0
        host.check(ready)
        with pytest.raises(prestage.errors.NoSlotError):
            next(device.wait_ready(0, 1))
        assert device.counters("misses", "refused", "useless") == (4, 1, 1)


def test_copies_at_once_leave_demands_first():
    """A copier that copies within the call: none of a prefetch while a layer is waited for."""
    host = Host()
    with prestage.open("model://", config=CONFIG, copier=host.copy) as device:
        device.configure(hints=True, prefetch=False)
        device.begin_token(0, 1)
        device.hint(0, 2, 6)
        for layer in range(2):
            device.route(0, layer, [1, 2])
            assert not arrive(device, host, 0, layer)
        assert all(demand for *_, demand in host.calls)
        device.flush()
        assert [call for call in host.calls if not call[-1]] == [
            (2, 6, host.calls[-1][2], tile, False) for tile in range(CONFIG.tiles)
        ]
        device.route(0, 2, [6, 1])
        assert not arrive(device, host, 0, 2)
        assert device.counters("hits", "useful", "late") == (1, 1, 0)
        hit("mover.overlap")


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "tiles"])
def test_layers_go_on_while_prefetches_never_end(whole):
    """Threads copy; what a layer doesn't want itself is copied only when nobody is left to wait."""
    config = CONFIG.replace(expert_bytes=4096, tile_bytes=4096 if whole else 512)
    host = Host(config)
    wanted = {}  # prefetches under way: they end when a layer wants them
    ends = threading.Event()

    def copy(*fetch):
        if not fetch[-1]:
            assert wanted[fetch[:2]].wait(60)
        host.copy(*fetch)

    with ThreadPoolExecutor(4) as pool:

        def copier(*fetch):
            if not fetch[-1]:
                event = wanted.setdefault(fetch[:2], threading.Event())
                if ends.is_set():
                    event.set()
            return pool.submit(copy, *fetch)

        with prestage.open("model://", config=config, copier=copier) as device:
            for token in range(40):
                device.begin_token(0, token)
                for layer in range(config.model.layers):
                    experts = [(layer + token % 4 * 2) % 8, (layer + 3 + token % 4 * 2) % 8]
                    device.route(0, layer, experts)
                    for expert in experts:
                        wanted.setdefault((layer, expert), threading.Event()).set()
                    assert not arrive(device, host, 0, layer)
                    for expert in experts:
                        del wanted[layer, expert]
                    device.release(0, layer)
            ends.set()
            for event in wanted.values():
                event.set()
            device.drain()
            stats = device.stats()
    assert stats["late"] > 10 and stats["prefetch_issued"] > 20
    assert stats["hits"] + stats["misses"] + stats["late"] + stats["merged"] == stats["demands"]
    hit("mover.overlap")


@pytest.mark.soak
def test_slots_in_the_device():
    """What the copier gives back is what the consumer port and the link read."""
    config = CONFIG.replace(host_writes=True)
    host = Host(config)

    def copier(layer, expert, slot, tile, nbytes, demand):
        return host.weights[layer, expert, tile * nbytes : (tile + 1) * nbytes]

    for url in DEVICES:
        with prestage.open(url, config=config, copier=copier) as device:
            for token in range(4):
                device.begin_token(0, token)
                for layer in range(4):
                    device.route(0, layer, [(token + layer) % 8, (token + 5) % 8])
                    for ready in device.wait_ready(0, layer):
                        whole = host.weights[layer, ready.expert].tobytes()
                        assert device.read(ready) == whole
                        assert device.read(ready, over_link=True) == whole
                    device.release(0, layer)
            device.drain()
            stats = device.stats()
            assert stats["fills"] > 10 and stats["writes_refused"] == stats["rejected"] == 0
    hit("mover.driver_writes")


def test_copies_that_take_too_long():
    """A copy fails in time; when it ends after all, nothing is changed and nobody complains."""
    with gated("sim://", timeout=20_000) as (device, gate, host):
        hint(device, gate, 1, 6)
        device.route(0, 1, [6, 4])
        arrived = device.wait_ready(0, 1)
        assert next(arrived).expert == 4
        until(device, lambda: len(gate.tiles(1, 6)) == CONFIG.tiles)
        for _ in range(6):
            device.run(5000)
        with pytest.raises(prestage.errors.MemoryTimeoutError, match="TIMEOUT.* expert 6"):
            next(device.wait_ready(0, 1))
        gate.open()
        until(device, lambda: not device.copying)
        device.release(0, 1)
        device.drain()
        assert device.counters("rejected", "fill_errors") == (1, 1)
        device.route(0, 1, [6, 4])
        assert not arrive(device, host, 0, 1)
        hit("mover.timeout")
