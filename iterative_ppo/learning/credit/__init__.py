"""Credit assigners: turn rewards in place of the outcome, before Q is fitted (credit.assigner)."""

from __future__ import annotations

from iterative_ppo.learning.credit.assignment import OBJECTIVE, Credit, credited, with_rewards

__all__ = ["OBJECTIVE", "Credit", "credited", "with_rewards"]
