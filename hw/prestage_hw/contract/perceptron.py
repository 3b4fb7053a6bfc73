"""Shape of the ``perceptron`` predictor: its heads, their features and how weights are stored.

The arithmetic is written down in ``docs/predictor-perceptron.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from .checks import require_power_of_two

__all__ = [
    "CROSSES",
    "FEATURES",
    "FORMS",
    "HISTORY_FEATURES",
    "TOKEN_FEATURES",
    "HeadConfig",
    "PerceptronConfig",
    "perceptron_form",
]

#: Sets of k experts out of the context's history. For target layer m and horizon h: this token's
#: choice at m - h, m - h - 1 and m - h - 2 (A, C, D), the previous token's at m, m + 1 and m - 1
#: (B, Bn, Bp), and that of the token before it at m (G).
HISTORY_FEATURES = ("A", "C", "D", "B", "Bn", "Bp", "G")

#: Sets of k experts out of the token tables: the choice at m when this token id was last seen (T)
#: and the time before (T2), when this pair of tokens was last seen (Q), and what followed the
#: previous token id the last time (S).
TOKEN_FEATURES = ("T", "T2", "Q", "S")

FEATURES = HISTORY_FEATURES + TOKEN_FEATURES

#: Conjunctions of two experts: the first two of A with the first two of C or B (AC, AB), and the
#: unordered pairs among the first three of A (AA).
CROSSES = ("AC", "AA", "AB")

_OF_THIS_TOKEN = ("A", "C", "D")
_OF_REUSE = ("B", "Bn", "Bp", "G", "S")
_MOST_HORIZON = 3


def _require_names(what: str, names: object, known: tuple[str, ...]) -> None:
    """Refuse what is not a tuple of distinct known names."""
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"{what} must be a tuple of names, not {names!r}")
    for name in names:
        if name not in known:
            raise ValueError(f"{what} must be among {', '.join(known)}, not {name!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"{what} must be distinct, not {names!r}")


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """One online linear model of a predictor.

    Parameters
    ----------
    name : :class:`str`
        ``"P1"`` to ``"P3"`` predict that many layers ahead, when a layer is routed; ``"P0"``
        predicts all layers at token start; ``"R"`` gives the reuse value of a layer's experts
        after it was routed.
    rows : tuple of :class:`str`
        Features (:data:`FEATURES`) with a weight for each source and target expert.
    crosses : tuple of :class:`str`
        Conjunctions (:data:`CROSSES`) with a hashed row of weights each; only for P1 to P3.
    diagonals : tuple of :class:`str`
        Features with a weight for each expert, which says what its own presence in the set is
        worth. At most 8.

    Raises
    ------
    TypeError
        If a name is not a string.
    ValueError
        If a name is unknown, repeated, or not known when the head predicts.
    """

    name: str
    rows: tuple[str, ...] = ()
    crosses: tuple[str, ...] = ()
    diagonals: tuple[str, ...] = ()

    NAMES = ("P1", "P2", "P3", "P0", "R")

    def __post_init__(self) -> None:
        if self.name not in self.NAMES:
            raise ValueError(f"Head name must be one of {', '.join(self.NAMES)}, not {self.name!r}")
        _require_names(f"Row features of {self.name}", self.rows, FEATURES)
        _require_names(f"Crosses of {self.name}", self.crosses, CROSSES)
        _require_names(f"Diagonal features of {self.name}", self.diagonals, FEATURES)
        if len(self.diagonals) > 8:
            raise ValueError(
                f"Diagonal features of {self.name} must be at most 8, not {len(self.diagonals)}"
            )
        for feature in (*self.rows, *self.diagonals):
            if self.horizon == 0 and feature in _OF_THIS_TOKEN:
                raise ValueError(f"Feature {feature} of {self.name} is not known at token start")
            if self.is_reuse and feature not in _OF_REUSE:
                raise ValueError(
                    f"Features of R must be among {', '.join(_OF_REUSE)}, not {feature!r}"
                )
        if self.crosses and not self.horizon:
            raise ValueError(f"Crosses need this token's choices, which {self.name} does not have")

    @property
    def is_reuse(self) -> bool:
        """Whether this is the head of reuse values."""
        return self.name == "R"

    @property
    def horizon(self) -> int:
        """Layers ahead, 1 to 3; 0 for P0 and R."""
        return 0 if self.is_reuse else int(self.name[1:])

    @property
    def weight_bits(self) -> int:
        """Width of a weight, in bits, sign included."""
        return 12 if self.is_reuse else 8

    @property
    def value_bits(self) -> int:
        """Width of a probability (P heads, in 1/256) or reuse value (R, in 1/1024), in bits."""
        return 10 if self.is_reuse else 8

    def features(self) -> frozenset[str]:
        """Features whose sets the head looks at."""
        crossed = (name for cross in self.crosses for name in cross)
        return frozenset({*self.rows, *self.diagonals, *crossed})

    def replace(self, **changes: Any) -> HeadConfig:
        """The same head with some parameters changed, validated again."""
        return replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class PerceptronConfig:
    """Parameters of the ``perceptron`` predictor.

    Parameters
    ----------
    heads : tuple of :class:`HeadConfig`
        Heads, P1 and P0 at least, in the order P1, P2, P3, P0, R.
    lanes : :class:`int`
        Weights that are read and written side by side (W): a power of two from 2 to 1024. More
        than the experts are as many as the experts, rounded up to a power of two.
    list_entries : :class:`int`
        Weights kept in a row (K): a power of two from ``lanes`` on and below the expert count, or
        0 for a weight for each expert ("full rows").
    cross_rows : :class:`int`
        Hashed rows of a conjunction in a layer: a power of two from 4 to 4096.
    token_rows : :class:`int`
        Entries of the tables by token and by successor: a power of two from 4 to 2**20.
    pair_rows : :class:`int`
        Entries of the table by pair of tokens: a power of two from 4 to 2**20.
    token_store : :class:`str`
        Where the token tables lie: ``"block"`` (block RAM) or ``"memory"`` (the memory port).
    banked : :class:`bool`
        Whether every context has weights of its own; else all share them.
    hints : :class:`bool`
        Whether hints are weighed by learned trust; else they are dropped.

    Raises
    ------
    TypeError
        If a parameter is not of its type.
    ValueError
        If a parameter is out of its range.
    """

    heads: tuple[HeadConfig, ...]
    lanes: int = 8
    list_entries: int = 0
    cross_rows: int = 256
    token_rows: int = 512
    pair_rows: int = 512
    token_store: str = "block"
    banked: bool = False
    hints: bool = True

    STORES = ("block", "memory")

    def __post_init__(self) -> None:
        if not isinstance(self.heads, tuple) or not all(
            isinstance(head, HeadConfig) for head in self.heads
        ):
            raise TypeError(f"Heads must be a tuple of HeadConfig, not {self.heads!r}")
        names = [head.name for head in self.heads]
        if names != [name for name in HeadConfig.NAMES if name in names]:
            raise ValueError(
                f"Heads must be distinct and in the order {', '.join(HeadConfig.NAMES)},"
                f" not {', '.join(names)}"
            )
        for name in ("P1", "P0"):
            if name not in names:
                raise ValueError(f"Heads must include {name}, but are {', '.join(names)}")
        require_power_of_two("Lane count", self.lanes, low=2, high=1024)
        if self.list_entries != 0:
            require_power_of_two("List length", self.list_entries, low=2, high=512)
        require_power_of_two("Rows of a conjunction", self.cross_rows, low=4, high=4096)
        require_power_of_two("Rows of the token table", self.token_rows, low=4, high=1 << 20)
        require_power_of_two("Rows of the pair table", self.pair_rows, low=4, high=1 << 20)
        if self.token_store not in self.STORES:
            raise ValueError(
                f"Token store must be one of {', '.join(self.STORES)}, not {self.token_store!r}"
            )
        for what, value in (("Banked tables", self.banked), ("Hints", self.hints)):
            if not isinstance(value, bool):
                raise TypeError(f"{what} must be true or false, not {value!r}")

    def head(self, name: str) -> HeadConfig | None:
        """The head of that name, None if there is none."""
        return next((head for head in self.heads if head.name == name), None)

    @property
    def horizons(self) -> tuple[int, ...]:
        """Layers ahead that have a head of their own, ascending."""
        return tuple(head.horizon for head in self.heads if head.horizon)

    def features(self) -> frozenset[str]:
        """Features that any head uses."""
        return frozenset().union(*(head.features() for head in self.heads))

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> PerceptronConfig:
        """The parameters that :func:`dataclasses.asdict` has taken apart, with JSON in between."""
        heads = []
        for head in fields["heads"]:
            values: dict[str, Any] = {k: tuple(v) if k != "name" else v for k, v in head.items()}
            heads.append(HeadConfig(**values))
        return cls(**{**fields, "heads": tuple(heads)})

    def replace(self, **changes: Any) -> PerceptronConfig:
        """The same parameters with some changed, validated again."""
        return replace(self, **changes)


_MEMORY = ("B", "G", "T", "T2", "Q", "S")


@dataclass(frozen=True)
class _Form:
    """A named form: what it is for, and its parameters."""

    description: str
    config: PerceptronConfig = field(repr=False)


#: Named forms, by the name that :attr:`DeviceConfig.form` takes.
FORMS: dict[str, _Form] = {
    "lite": _Form(
        "block RAM of a small FPGA: one head a layer ahead, one for the rest",
        PerceptronConfig(
            heads=(
                HeadConfig(name="P1", rows=("A", "C"), diagonals=("B", "G", "T", "T2")),
                HeadConfig(name="P0", diagonals=("B", "G", "T", "T2")),
                HeadConfig(name="R", diagonals=("B", "G")),
            ),
            lanes=8,
            token_rows=512,
        ),
    ),
    "compressed": _Form(
        "128 experts in the block RAM of a small FPGA: a short list of successors for a row",
        PerceptronConfig(
            heads=(
                HeadConfig(name="P1", rows=("A", "C"), diagonals=("B", "T", "Q")),
                HeadConfig(name="P0", diagonals=("B", "T", "Q")),
                HeadConfig(name="R", diagonals=("G",)),
            ),
            lanes=8,
            list_entries=8,
            token_rows=8192,
            pair_rows=16384,
            token_store="memory",
        ),
    ),
    "full": _Form(
        "everything that pays, for parts with megabytes of memory on chip",
        PerceptronConfig(
            heads=(
                HeadConfig(
                    name="P1", rows=("A", "C", "D"), crosses=("AC", "AA", "AB"), diagonals=_MEMORY
                ),
                HeadConfig(
                    name="P2", rows=("A", "C", "D"), crosses=("AC", "AA", "AB"), diagonals=_MEMORY
                ),
                HeadConfig(
                    name="P3", rows=("A", "C", "D"), crosses=("AC", "AA", "AB"), diagonals=_MEMORY
                ),
                HeadConfig(name="P0", rows=("B", "Bn", "T", "Q"), diagonals=("G", "T2", "S")),
                HeadConfig(name="R", rows=("B", "Bn", "Bp"), diagonals=("G", "S")),
            ),
            lanes=1024,
            cross_rows=512,
            token_rows=8192,
            pair_rows=16384,
            token_store="memory",
        ),
    ),
}


def perceptron_form(name: str) -> PerceptronConfig:
    """Parameters of a named form.

    Raises
    ------
    ValueError
        If no form has that name.
    """
    try:
        return FORMS[name].config
    except KeyError:
        known = ", ".join(FORMS)
        raise ValueError(f"Predictor form must be one of {known}, not {name!r}") from None
