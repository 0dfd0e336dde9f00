"""The ramp: a challenger meets few customers first. Only the last stage, whose share stays, is evidence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from iterative_ppo.config import ABTestConfig


@dataclass(frozen=True)
class Ramp:
    """Safety stages of `hours` each with rising challenger shares, then the last share for good."""

    safety: tuple[float, ...]
    hours: float
    last: float

    @classmethod
    def of(cls, config: ABTestConfig) -> Ramp:
        return cls(config.ramp, config.ramp_hours, config.challenger_share)

    @property
    def evidence_from(self) -> float:
        """Hours after the start at which the last stage begins."""
        return self.hours * len(self.safety)

    def share(self, elapsed: float) -> float:
        """The challenger's share so many hours after the start.

        A unit's draw (`ab_test.assign`) does not change, so whoever meets the challenger keeps it as shares rise.
        """
        stage = int(elapsed // self.hours) if self.safety else 0
        return self.safety[stage] if stage < len(self.safety) else self.last

    def evidence(self, elapsed: np.ndarray) -> np.ndarray:
        """(N,) bool: conversations, by hours from the start to their assignment, that a test may look at.

        Pooled over stages, arms from different dates would be compared, and a change of rates in time would pass for
        a difference between them.
        """
        late: np.ndarray = np.asarray(elapsed) >= self.evidence_from
        return late
