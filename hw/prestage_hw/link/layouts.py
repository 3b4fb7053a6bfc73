"""Layouts of the messages that the link carries, and the lengths of their bodies."""

from amaranth import unsigned
from amaranth.lib import data

from prestage_hw.contract import MESSAGES
from prestage_hw.contract.params import require_config

__all__ = ["MessageLayout", "body_lengths"]


def body_lengths(config, *, to_device):
    """Body lengths in bytes by frame type, of all numbered messages in one direction."""
    return {
        message.code: message.body_bytes(config)
        for message in MESSAGES.values()
        if message.record is not None and message.to_device == to_device and message.known(config)
    }


class MessageLayout(data.StructLayout):
    """A message: its frame type and its body in wire order, byte 0 in element 0.

    Elements past the body's length, which follows from ``code``, mean nothing.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose bodies have to fit.
    to_device : :class:`bool`
        True for messages from the host, False for messages to the host.

    Members
    -------
    code : ``unsigned(8)``
        Frame type. A message from the host with a known type and a body of the wrong length has
        code 0, which is never a type.
    body : ``data.ArrayLayout(unsigned(8), ...)``
        As many bytes as the longest body in that direction.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig` or ``to_device`` is not a :class:`bool`.
    """

    def __init__(self, *, config, to_device):
        require_config(config)
        if not isinstance(to_device, bool):
            raise TypeError(f"Direction must be a boolean, not {to_device!r}")
        longest = max(body_lengths(config, to_device=to_device).values())
        super().__init__({"code": unsigned(8), "body": data.ArrayLayout(unsigned(8), longest)})
