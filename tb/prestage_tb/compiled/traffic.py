"""Routing traffic for benches of the compiled simulation, without the driver."""

from __future__ import annotations

import random
from collections import Counter

from prestage_hw.contract import MESSAGES, SimulatedPipe, decode_frame, encode_frame
from prestage_hw.contract.params import DeviceConfig
from prestage_hw.contract.records import LINK_ACK, LINK_NAK, ErrorCode, message_by_code

__all__ = ["Traffic"]


class Traffic:
    """Tokens with a made-up but lifelike routing.

    Every layer favours a few experts, and a token often chooses what the last one chose.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device that the frames are for.
    seed : :class:`int`
        Seed of the routing.

    Members
    -------
    replies : :class:`collections.Counter`
        Messages from the device by name.
    ready : :class:`dict`
        Slots of the experts that came ready for the layer in hand.
    """

    def __init__(self, config: DeviceConfig, *, seed: int = 1) -> None:
        self.config = config
        self.replies: Counter[str] = Counter()
        self.ready: dict[int, int] = {}
        self._random = random.Random(seed)
        self._sequence = 0
        self._expected = 0
        self._tag = 0
        self._last: dict[int, list[int]] = {}

    def frame(self, name: str, *values: object) -> bytes:
        """The next frame of a message."""
        message = MESSAGES[name]
        body = b"" if message.record is None else message.record.pack(self.config, *values)
        sequence, self._sequence = self._sequence, self._sequence + 1 & 0xFF
        return encode_frame(message.code, sequence=sequence, acknowledge=self._expected, body=body)

    def route(self, layer: int) -> list[int]:
        """Experts for a layer, distinct."""
        model = self.config.model
        chosen = [e for e in self._last.get(layer, []) if self._random.random() < 0.5]
        while len(chosen) < model.top_k:
            expert = int(model.experts * self._random.random() ** 2)
            if expert not in chosen:
                chosen.append(expert)
        self._last[layer] = chosen
        return chosen

    def take(self, data: bytes) -> int:
        """Count the replies in what came back; returns how many SYNCED were among them."""
        synced = 0
        for stuffed in data.split(b"\0"):
            if not stuffed:
                continue
            code, sequence, _, body = decode_frame(stuffed)
            message = message_by_code(code)
            assert message is not None
            self.replies[message.name] += 1
            if code in (LINK_ACK, LINK_NAK):
                continue
            if sequence != self._expected:
                continue
            self._expected = sequence + 1 & 0xFF
            if message.name == "READY":
                assert message.record is not None
                ready = message.record.unpack(self.config, body)
                assert isinstance(ready["expert"], int) and isinstance(ready["slot"], int)
                self.ready[ready["expert"]] = ready["slot"]
            elif message.name == "EVENT":
                assert message.record is not None
                event = message.record.unpack(self.config, body)
                raise RuntimeError(f"Device answered {ErrorCode(body[0]).name}: {event}")
            synced += message.name == "SYNCED"
        return synced

    def synchronize(self, pipe: SimulatedPipe, frames: bytes) -> None:
        """Send frames and a SYNC and wait for its answer."""
        self._tag = self._tag + 1 & 0xFFFF
        data = pipe.exchange(frames + self.frame("SYNC", self._tag))
        while not self.take(data):
            data = pipe.exchange(b"")
            if not data:
                raise RuntimeError("Device does not answer")

    def token(self, pipe: SimulatedPipe, *, check: bool = True) -> None:
        """Begin a token and route all its layers, each when the one before is done."""
        frames = self.frame("BEGIN_TOKEN", 0, 1, 0xFFFFFFFF)
        for layer in range(self.config.model.layers):
            experts = self.route(layer)
            self.ready.clear()
            self.synchronize(pipe, frames + self.frame("ROUTE", 0, layer, experts))
            arrived = self.ready
            if sorted(arrived) != sorted(experts):
                raise RuntimeError(f"Layer {layer} needs {experts}, but {arrived} came")
            if check:
                bad = pipe.compare(list(arrived.values()), [layer] * len(arrived), list(arrived))
                if bad:
                    raise RuntimeError(
                        f"Layer {layer}: slots of {bad} in {arrived} hold wrong bytes"
                    )
            frames = self.frame("RELEASE", 0, layer)
        self.synchronize(pipe, frames)
