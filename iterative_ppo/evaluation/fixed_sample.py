"""The fixed-sample design: one look, at the planned size."""

from __future__ import annotations

from dataclasses import dataclass, replace

from iterative_ppo.config import ABTestConfig
from iterative_ppo.evaluation.experiment import History, Look, concluded, interval, opening


@dataclass(frozen=True)
class FixedSample:
    """Score test of the difference at one-sided `alpha` once `config.conversations` have matured."""

    config: ABTestConfig
    alpha: float

    def look(self, history: History) -> Look:
        """Before the planned size: continue, with nothing looked at. Raises TurnTableError for a faulty history."""
        from scipy.stats import norm

        look, arms = opening("fixed", history, self.config)
        if arms is None:
            return look
        if look.fraction < 1:
            matured, planned = sum(look.conversations), self.config.conversations
            return replace(look, reasons=(f"{matured} of {planned} planned conversations have matured",))
        gain, z, bound = float(arms.gain), float(arms.z), float(norm.isf(self.alpha))
        low, high = interval(gain, float(arms.half_width(bound)))
        found = replace(look, statistic=z, bound=bound, estimate=gain, low=low, high=high)
        return concluded(found, promote=z >= bound, mde=None, alpha=self.alpha)
