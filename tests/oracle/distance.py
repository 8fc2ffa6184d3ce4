"""How far logits are from the reference's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

FloatArray = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

ROWS_AT_ONCE = 128  # float64 rows of a whole vocabulary are large


@dataclass(frozen=True, slots=True)
class Distance:
    """Measures for each position; logits are taken about their mean there, since softmax does not see a shift."""

    kl: Float64Array  # divergence of the next-token distribution from the reference's, in nats
    same_top: npt.NDArray[np.bool_]
    lead: Float64Array  # the reference's logit of its own top token above that of the other's
    squared_error: Float64Array
    squared_reference: Float64Array

    @property
    def mean_kl(self) -> float:
        """Mean divergence in nats."""
        return float(self.kl.mean())

    @property
    def relative_rms(self) -> float:
        """Root mean square of the error over that of the reference's logits."""
        return float(np.sqrt(self.squared_error.sum() / self.squared_reference.sum()))

    def __str__(self) -> str:
        differ = int((~self.same_top).sum())
        return (
            f"{len(self.kl):,} tokens: relative RMS error of the logits {self.relative_rms:.1e}; "
            f"KL mean {self.mean_kl:.1e}, 99 % below {np.quantile(self.kl, 0.99):.1e}, largest {self.kl.max():.1e}; "
            f"top token the same {self.same_top.mean():.2%}"
            + (f", else behind by {self.lead.max():.3f} at most" if differ else "")
        )


def distance(reference: FloatArray, logits: FloatArray) -> Distance:
    """Compare (T, vocab_size) with (T, vocab_size)."""
    assert reference.shape == logits.shape
    starts = range(0, len(reference), ROWS_AT_ONCE)
    return joined(
        [_distance(*(_tensor(rows[start : start + ROWS_AT_ONCE]) for rows in (reference, logits))) for start in starts]
    )


def joined(parts: Sequence[Distance]) -> Distance:
    """Several stretches as one."""
    return Distance(*(np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Distance)))


def _tensor(rows: FloatArray) -> Any:
    wide = torch.from_numpy(rows).double()
    return wide - wide.mean(dim=1, keepdim=True)


def _distance(reference: Any, logits: Any) -> Distance:
    expected, found = reference.log_softmax(dim=1), logits.log_softmax(dim=1)
    top = logits.argmax(dim=1, keepdim=True)
    return Distance(
        kl=(expected.exp() * (expected - found)).sum(dim=1).numpy(),
        same_top=(reference.argmax(dim=1) == top[:, 0]).numpy(),
        lead=(reference.amax(dim=1) - reference.gather(1, top)[:, 0]).numpy(),
        squared_error=(logits - reference).square().sum(dim=1).numpy(),
        squared_reference=reference.square().sum(dim=1).numpy(),
    )
