"""The driver with a copier, on compiled RTL against the golden model.

::

    routes ─▶ Device ─▶ sim://    ─▶ FETCH ─▶ copier ─▶ slots (NumPy)
         └──▶ Device ─▶ model://  ─▶ the same
"""

import random
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

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
