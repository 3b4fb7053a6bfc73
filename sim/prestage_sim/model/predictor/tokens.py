"""Golden model of the token tables: what was routed when a token was last seen."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.records import NO_TOKEN

from ..._jit import compiled

__all__ = [
    "TokenTables",
    "clear_tokens",
    "create_tokens",
    "token_fetch",
    "token_place",
    "token_store",
]


class TokenTables(NamedTuple):
    """The three tables.

    Parameters
    ----------
    tags : array of ``int32``, shape ``[3, rows]``
        Tag of each entry, -1 where it is empty; tables by token, by pair, by successor.
    token : array of ``int16``, shape ``[rows, 2, layers, k]``
        Last choice of a token and the one before; -1 where there is none.
    pair : array of ``int16``, shape ``[rows, 1, layers, k]``
        Last choice of a pair of tokens.
    successor : array of ``int16``, shape ``[rows, 1, layers, k]``
        Last choice of what followed a token.
    """

    tags: NDArray[np.int32]
    token: NDArray[np.int16]
    pair: NDArray[np.int16]
    successor: NDArray[np.int16]


def create_tokens(config: DeviceConfig) -> TokenTables:
    """Cleared tables; one row where no feature asks for a table."""
    perceptron = config.perceptron
    assert perceptron is not None
    used = perceptron.features()
    tokens = perceptron.token_rows if used & {"T", "T2"} else 1
    pairs = perceptron.pair_rows if "Q" in used else 1
    successors = perceptron.token_rows if "S" in used else 1
    choice = (config.model.layers, config.model.top_k)
    return TokenTables(
        tags=np.full((3, max(tokens, pairs, successors)), -1, np.int32),
        token=np.full((tokens, 2, *choice), -1, np.int16),
        pair=np.full((pairs, 1, *choice), -1, np.int16),
        successor=np.full((successors, 1, *choice), -1, np.int16),
    )


def clear_tokens(tables: TokenTables) -> None:
    """Empty all tables."""
    for table in tables:
        table[:] = -1


@compiled
def token_place(token: Any, other: Any, rows: Any) -> Any:
    """Entry and tag of a token (``other`` < 0) or of a pair, the second being the token before."""
    bits = 0
    while 1 << bits < rows:
        bits += 1
    if other < 0:
        return token & (rows - 1), (token >> bits) & 0xFFFF
    return (
        (token ^ (other << 5) ^ (other >> 9)) & (rows - 1),
        (other ^ (token >> bits)) & 0xFFFF,
    )


@compiled
def _fetch(tags: Any, table: Any, token: Any, other: Any, choices: Any) -> None:
    """Copy an entry's choices, or mark them unknown."""
    choices[:] = -1
    if table.shape[0] > 1:
        at, tag = token_place(token, other, table.shape[0])
        if tags[at] == tag:
            choices[:] = table[at]


@compiled
def token_fetch(tables: Any, token: Any, previous: Any, memo: Any) -> None:
    """Look up a token that starts.

    Parameters
    ----------
    tables : :class:`TokenTables`
        The tables.
    token, previous : :class:`int`
        Ids of this token and of the one before; ``NO_TOKEN`` where not known.
    memo : array of ``int16``, shape ``[6, layers, k]``
        Sets of the context (T, T2, Q, S, the S of the next token, nothing), which are replaced.
    """
    memo[3] = memo[4]
    memo[:3] = -1
    memo[4] = -1
    if token != NO_TOKEN:
        _fetch(tables.tags[0], tables.token, token, -1, memo[0:2])
        _fetch(tables.tags[2], tables.successor, token, -1, memo[4:5])
        if previous != NO_TOKEN:
            _fetch(tables.tags[1], tables.pair, token, previous, memo[2:3])


@compiled
def token_store(tables: Any, token: Any, previous: Any, this: Any) -> None:
    """Remember the choices of a token that has ended.

    Parameters
    ----------
    tables : :class:`TokenTables`
        The tables.
    token, previous : :class:`int`
        Ids of that token and of the one before; ``NO_TOKEN`` where not known.
    this : array of ``int16``, shape ``[layers, k]``
        Its choices, -1 where a layer was not routed.
    """
    if tables.token.shape[0] > 1 and token != NO_TOKEN:
        at, tag = token_place(token, -1, tables.token.shape[0])
        if tables.tags[0, at] == tag:
            tables.token[at, 1] = tables.token[at, 0]
        else:
            tables.token[at, 1] = -1
        tables.token[at, 0] = this
        tables.tags[0, at] = tag
    if previous == NO_TOKEN:
        return
    if tables.pair.shape[0] > 1 and token != NO_TOKEN:
        at, tag = token_place(token, previous, tables.pair.shape[0])
        tables.pair[at, 0] = this
        tables.tags[1, at] = tag
    if tables.successor.shape[0] > 1:
        at, tag = token_place(previous, -1, tables.successor.shape[0])
        tables.successor[at, 0] = this
        tables.tags[2, at] = tag
