"""What steps read of a mixture's experts: one formula for ops, engine and planner, which imports no arrays."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ExpertsRead:
    """What a layer of experts reads: of `num_experts` those that some row chose, each row `num_chosen` of them."""

    num_experts: int
    num_chosen: int
    expert_bytes: int  # of one

    def bytes_for(self, rows: int) -> float:
        """Bytes of the experts that so many rows choose, expected where any choice is as likely; exact for one row."""
        return self.expert_bytes * self.num_experts * (1.0 - (1.0 - self.num_chosen / self.num_experts) ** rows)
