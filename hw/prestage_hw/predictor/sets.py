"""What the blocks of the ``perceptron`` predictor share: sets of experts, random numbers."""

from functools import reduce
from operator import xor

from amaranth import Cat, Const, Value, unsigned
from amaranth.lib import data

from prestage_hw.contract.params import require_config
from prestage_hw.contract.perceptron import FEATURES

__all__ = ["LFSR_SEED", "SETS", "SetLayout", "lfsr_next"]

#: Names of the sets, in their order in an array of all of them.
SETS = FEATURES

#: Seed of the first generator of random numbers; number n starts from seed + n.
LFSR_SEED = 0xACE1ACE1

_POLYNOMIAL = 0xA3000000
_STEPS = 8


class SetLayout(data.StructLayout):
    """Layout of a set: a choice of k distinct experts, or unknown.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose widths apply.

    Members
    -------
    experts : array of k expert numbers
        The experts, in the router's order.
    valid : 1 bit
        Whether the set is known. The experts of an unknown set mean nothing.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig`.
    """

    def __init__(self, config):
        require_config(config)
        experts = data.ArrayLayout(unsigned(config.bits("expert")), config.model.top_k)
        super().__init__({"experts": experts, "valid": 1})


def _step(word):
    """State of the random numbers one step on, of an :class:`int`."""
    return word >> 1 ^ (_POLYNOMIAL if word & 1 else 0)


def lfsr_next(state):
    """State of the random numbers eight steps on (Galois, 32 bits, polynomial 0xA3000000).

    Parameters
    ----------
    state : value-like, 32 bits
        Present state.

    Returns
    -------
    :class:`amaranth.hdl.Value`
        Next state: each bit is an XOR of bits of ``state``.
    """
    state = Value.cast(state)
    # The step is linear over GF(2): where each single bit goes tells what every bit is made of.
    images = []
    for bit in range(32):
        word = 1 << bit
        for _ in range(_STEPS):
            word = _step(word)
        images.append(word)
    return Cat(
        reduce(xor, (state[bit] for bit in range(32) if images[bit] >> to & 1), Const(0, 1))
        for to in range(32)
    )
