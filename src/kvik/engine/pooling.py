"""From the hidden states of a prompt to one vector, in any chunks the same bits."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kvik.config import Pooling


class PooledHidden:
    """The hidden states of a sequence's tokens as far as they are computed: the last one, or the sum of all."""

    def __init__(self, pooling: Pooling) -> None:
        self._pooling = pooling
        self._num_tokens = 0  # that are in the sum
        self._sum: npt.NDArray[np.float64] | None = None

    def add(self, first: int, rows: npt.NDArray[np.float32]) -> None:
        """Take the rows (H, hidden_size) from position `first` on.

        "last" keeps the newest. "mean" adds one after the other, in float64; those that a preempted sequence computes
        again are in the sum already.
        """
        if self._pooling == "last":
            self._sum, self._num_tokens = rows[-1].astype(np.float64), 1
            return
        assert first <= self._num_tokens, f"rows from {first} on behind {self._num_tokens}"
        if self._sum is None:
            self._sum = np.zeros(rows.shape[1])
        for row in rows[self._num_tokens - first :]:
            self._sum += row
            self._num_tokens += 1

    def vector(self, *, normalize: bool) -> npt.NDArray[np.float32]:
        """What was pooled (hidden_size,): computed in float64 and rounded once; of length 1 with `normalize`.

        The sum of squares is the exact one, so that no order of adding shows. A vector of zeros stays as it is.
        """
        assert self._sum is not None
        pooled = self._sum / self._num_tokens
        if normalize and np.isfinite(pooled).all() and (norm := math.sqrt(math.fsum(pooled * pooled))) > 0:
            pooled /= norm
        return pooled.astype(np.float32)
