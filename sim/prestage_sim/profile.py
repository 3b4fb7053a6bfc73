"""Correlation rows from a trace: the offline profile that the predictor starts from."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from prestage_hw.contract import DeviceConfig
from prestage_hw.contract.params import require_config

__all__ = ["CORRELATION_TABLE", "correlation_profile"]

#: Number of the table that a profile is for.
CORRELATION_TABLE = 0

_CONFIDENCE = 2
_VALID = 1 << 18


def correlation_profile(experts: ArrayLike, *, config: DeviceConfig) -> NDArray[np.uint32]:
    """Words of the ``st_moe`` correlation table that a trace calls for.

    The row of each layer and source holds the K experts that followed most often in the next layer,
    most frequent first (equally frequent ones by number), with confidence 2. Entries without a
    successor are invalid.

    Parameters
    ----------
    experts : array of :class:`int`, shape ``[tokens, layers, top_k]``
        Chosen experts, as in a trace.
    config : :class:`DeviceConfig`
        Device that the profile is for.

    Returns
    -------
    array of ``uint32``, shape ``[words]``
        The whole table, index is the word's number: write it from word 0 on.

    Raises
    ------
    TypeError
        If ``config`` is not a :class:`DeviceConfig` or ``experts`` are not integers.
    ValueError
        If the shape or an expert does not fit the configuration.
    """
    require_config(config)
    choices = np.asarray(experts)
    if not np.issubdtype(choices.dtype, np.integer):
        raise TypeError(f"Experts must be integers, not {choices.dtype}")
    layers, count, top_k = config.model.layers, config.model.experts, config.model.top_k
    if choices.ndim != 3 or choices.shape[1:] != (layers, top_k):
        raise ValueError(
            f"Experts must have the shape [tokens, {layers}, {top_k}], not {list(choices.shape)}"
        )
    if choices.size and not 0 <= choices.min() <= choices.max() < count:
        raise ValueError(
            f"Experts must be between 0 and {count - 1}, but are {choices.min()} to {choices.max()}"
        )
    successors = config.successors
    rows = 1 << (count - 1).bit_length()
    entries = 1 << (successors - 1).bit_length()
    words = np.zeros((layers - 1, rows, entries), dtype=np.uint32)
    for layer in range(layers - 1):
        chosen = np.zeros((2, len(choices), count), dtype=np.float32)
        for step in range(2):
            np.put_along_axis(chosen[step], choices[:, layer + step].astype(np.int64), 1, axis=1)
        followed = (chosen[0].T @ chosen[1]).astype(np.int64)
        best = np.argsort(-followed, axis=1, kind="stable")[:, :successors]
        seen = np.take_along_axis(followed, best, axis=1) > 0
        words[layer, :count, :successors] = np.where(seen, best | _CONFIDENCE << 16 | _VALID, 0)
    return words.reshape(-1)
