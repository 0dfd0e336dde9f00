"""The group sequential design: a few looks on the way, their common level spent as O'Brien and Fleming would."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from iterative_ppo.config import ABTestConfig
from iterative_ppo.evaluation.experiment import History, Look, concluded, interval, opening
from iterative_ppo.evaluation.spending import upper_bounds


@dataclass(frozen=True)
class GroupSequential:
    """A look is due at each `1 / config.looks` of `config.conversations`, at whatever size it then finds.

    The interval is Jennison & Turnbull's repeated one: gain and standard error times the look's bound, where outcomes
    are compared by business as a quantile of t. Stopping for futility does not enter the bounds, so it need not be
    obeyed.
    """

    config: ABTestConfig
    alpha: float

    def look(self, history: History) -> Look:
        """Between due looks: continue, with nothing spent. Raises TurnTableError for a faulty history."""
        look, arms = opening("group_sequential", history, self.config)
        if arms is None:
            return look
        taken = [earlier.fraction for earlier in history.earlier if earlier.statistic is not None]
        due = self._due(taken[-1] if taken else 0.0)
        if sum(look.conversations) < due:
            return replace(look, reasons=(f"next look at {due} matured conversations, now {sum(look.conversations)}",))
        z, bound = float(arms.z), upper_bounds([*taken, look.fraction], self.alpha)[-1]
        gain = float(arms.gain)
        low, high = interval(gain, float(arms.half_width(bound)))
        found = replace(look, statistic=z, bound=bound, estimate=gain, low=low, high=high)
        return concluded(found, promote=z >= bound, mde=self.config.mde, alpha=self.alpha)

    def _due(self, fraction: float) -> int:
        """Matured conversations at which the look after one at `fraction` is due."""
        following = math.floor(fraction * self.config.looks + 1e-9) + 1
        return math.ceil(following * self.config.conversations / self.config.looks - 1e-9)
