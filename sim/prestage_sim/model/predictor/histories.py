"""Golden model of the histories: what each context routed lately, and the token tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config
from prestage_hw.contract.perceptron import FEATURES
from prestage_hw.contract.records import NO_TOKEN, Phase

from .linear import NOW, OLD, gather
from .tokens import (
    clear_tokens,
    create_tokens,
    token_fetch,
    token_place,
    token_store,
)

__all__ = ["Histories"]

#: Features that need this token's choices, which a head of horizon 0 does not have.
_OF_THIS_TOKEN = ("A", "C", "D")


class Histories:
    """Choices of the last three tokens of each context, and what the token tables know.

    Parameters
    ----------
    config : :class:`DeviceConfig`
        Device whose predictor is a ``perceptron``.

    Attributes
    ----------
    this, prev, before : array of ``int16``, shape ``[contexts, layers, k]``
        Choices of the present token, the one before, and the one before that; -1 where unknown.
    memo : array of ``int16``, shape ``[contexts, 6, layers, k]``
        Sets T, T2, Q, S, the S of the next token, and one that is always unknown.
    tables : :class:`TokenTables`
        The token tables.
    """

    def __init__(self, config: DeviceConfig) -> None:
        require_config(config)
        perceptron = config.perceptron
        assert perceptron is not None
        self.config = config
        model = config.model
        self._layers, self._top_k = model.layers, model.top_k
        self._expert_bits = config.bits("expert")
        shape = (config.contexts, model.layers, model.top_k)
        self.this, self.prev, self.before = (np.full(shape, -1, np.int16) for _ in range(3))
        self.memo = np.full((config.contexts, 6, *shape[1:]), -1, np.int16)
        self.tables = create_tokens(config)
        self._tokens = np.full((config.contexts, 2), NO_TOKEN, np.int64)
        self._phases = [int(Phase.PREFILL)] * config.contexts
        self._used: dict[bool, set[str]] = {False: set(), True: set()}
        for head in perceptron.heads:
            self._used[head.is_reuse] |= head.features()
        # Words that the table port wrote, by (table, index): what it wrote is read back even where
        # it means nothing.
        self._written: dict[tuple[int, int], int] = {}

    def clear(self) -> None:
        """Forget everything, contexts included."""
        for array in (self.this, self.prev, self.before, self.memo):
            array[:] = -1
        clear_tokens(self.tables)
        self._tokens[:] = NO_TOKEN
        self._phases = [int(Phase.PREFILL)] * self.config.contexts
        self._written.clear()

    def begin(self, ctx: int, token: int, phase: int) -> None:
        """Start a token: remember the one that has ended, look the new one up.

        Parameters
        ----------
        ctx : :class:`int`
            Context.
        token : :class:`int`
            Id of the token, ``NO_TOKEN`` where it isn't known.
        phase : :class:`int`
            A :class:`Phase`.
        """
        previous, ended = (int(number) for number in self._tokens[ctx])
        if self._phases[ctx] != Phase.PREFILL and self.this[ctx, 0, 0] >= 0:
            token_store(self.tables, ended, previous, self.this[ctx])
            self._forget_written(ended, previous)
        self.before[ctx], self.prev[ctx] = self.prev[ctx], self.this[ctx]
        self.this[ctx] = -1
        token_fetch(self.tables, token, ended, self.memo[ctx])
        self._tokens[ctx] = ended, token
        self._phases[ctx] = phase

    def route(self, ctx: int, layer: int, experts: Sequence[int]) -> None:
        """Take the router's choice for a layer as that of the present token."""
        self.this[ctx, layer] = experts

    def sets(
        self, ctx: int, layer: int, *, horizon: int = 0, reuse: bool = False, now: bool = False
    ) -> NDArray[np.int16]:
        """Sets of a target layer, those that a head of the device looks at.

        Parameters
        ----------
        ctx, layer : :class:`int`
            Context and target layer.
        horizon : :class:`int`
            Horizon of the head, 0 to 3.
        reuse : :class:`bool`
            Whether the sets are for the reuse head.
        now : :class:`bool`
            Reuse head: after this visit of the layer, not the visit before.

        Returns
        -------
        array of ``int16``, shape ``[11, k]``
            Sets in the order of ``FEATURES``, -1 where unknown.
        """
        result = np.full((len(FEATURES), self._top_k), -1, np.int16)
        found = np.zeros(self._top_k, np.int64)
        for code, name in enumerate(FEATURES):
            if name not in self._used[reuse] or (horizon == 0 and name in _OF_THIS_TOKEN):
                continue
            if gather(
                code,
                int(reuse),
                NOW if now else OLD,
                layer,
                horizon,
                self.this[ctx],
                self.prev[ctx],
                self.before[ctx],
                self.memo[ctx],
                found,
            ):
                result[code] = found
        return result

    def forget_ids(self, ctx: int) -> None:
        """Lose the ids of a context's tokens: the present token will not be stored."""
        self._tokens[ctx] = NO_TOKEN
        self._phases[ctx] = int(Phase.PREFILL)

    # --- snapshots

    def table_words(self, table: int) -> int:
        """Words in a table (by token, by pair, by successor), 0 if there is none of that number or
        if it lies in the host's memory.
        """
        rows = self._rows(table)
        return rows * (1 + self._layers * self._chunks(table)) if rows else 0

    def read_table(self, table: int, word: int) -> int:
        """A table word, 0 beyond the last."""
        if word >= self.table_words(table):
            return 0
        rows, chunks = self._rows(table), self._chunks(table)
        if word < rows:
            return self._word(table, word)
        index, chunk = divmod(word - rows, chunks)
        return self._word(table, rows + index) >> 32 * chunk & 0xFFFFFFFF

    def write_table(self, table: int, word: int, value: int) -> None:
        """Write a table word; nothing happens beyond the last."""
        if word >= self.table_words(table):
            return
        rows, chunks = self._rows(table), self._chunks(table)
        if word < rows:
            value &= 0x1FFFF
            self._written[table, word] = value
            self.tables.tags[table, word] = value & 0xFFFF if value >> 16 else -1
            return
        index, chunk = divmod(word - rows, chunks)
        bits = self._word(table, rows + index)
        bits = bits & ~(0xFFFFFFFF << 32 * chunk) | value << 32 * chunk
        set_bits = self._top_k * self._expert_bits + 1
        row = self.tables[1 + table]
        bits &= (1 << row.shape[1] * set_bits) - 1
        self._written[table, rows + index] = bits
        entry, layer = divmod(index, self._layers)
        for choice in range(row.shape[1]):
            row[entry, choice, layer] = self._unpack(bits >> choice * set_bits)

    def _rows(self, table: int) -> int:
        """Entries of a table that the table port reaches."""
        perceptron = self.config.perceptron
        assert perceptron is not None
        if perceptron.token_store == "memory" or table > 2:
            return 0
        rows = int(self.tables[1 + table].shape[0])
        return rows if rows > 1 else 0

    def _forget_written(self, token: int, previous: int) -> None:
        """A token was stored: what the table port wrote to its entries is gone."""
        if not self._written:
            return
        keys = ((token, None), (token, previous), (previous, None))
        for table, (first, second) in enumerate(keys):
            rows = self._rows(table)
            if rows and first != NO_TOKEN and second != NO_TOKEN:
                other = -1 if second is None else second
                entry, _ = token_place(first, other, rows)
                row = rows + entry * self._layers
                for index in (entry, *range(row, row + self._layers)):
                    self._written.pop((table, index), None)

    def _chunks(self, table: int) -> int:
        """Table words in a stored row word."""
        choices = int(self.tables[1 + table].shape[1])
        return -(-choices * (self._top_k * self._expert_bits + 1) // 32)

    def _word(self, table: int, index: int) -> int:
        """A stored word without parity: tag words first, then row words."""
        if (table, index) in self._written:
            return self._written[table, index]
        rows = self._rows(table)
        if index < rows:
            tag = int(self.tables.tags[table, index])
            return tag | 1 << 16 if tag >= 0 else 0
        entry, layer = divmod(index - rows, self._layers)
        set_bits = self._top_k * self._expert_bits + 1
        return sum(
            self._pack(choice) << at * set_bits
            for at, choice in enumerate(self.tables[1 + table][entry, :, layer].tolist())
        )

    def _pack(self, choice: Sequence[int]) -> int:
        """Ids from bit 0, then the valid bit; 0 if unknown."""
        if choice[0] < 0:
            return 0
        bits = self._expert_bits
        return sum(e << at * bits for at, e in enumerate(choice)) | 1 << len(choice) * bits

    def _unpack(self, word: int) -> list[int]:
        """Ids of a stored set; unknown if it is not valid or an expert does not exist."""
        bits = self._expert_bits
        ids = [word >> at * bits & ((1 << bits) - 1) for at in range(self._top_k)]
        if not word >> self._top_k * bits & 1 or max(ids) >= self.config.model.experts:
            return [-1] * self._top_k
        return ids
