"""Rollback alarms: does a promoted champion serve worse than in the A/B test that promoted it?

An alarm turns a guardrail around: it needs evidence that a measure is worse by more than its margin. Level alpha / m
for m measures (Bonferroni), and of that alpha / (k (k + 1)) at the k-th look, which sums to alpha over all looks that
there can ever be. The k-th look is at the first n 2^(k-1) conversations since the promotion, so that looking every
night is no further look.

The champion's record in its A/B test is the better for having won it (the winner's curse); the margin must allow for
that too. Of an outcome or an acceptance below twice the margin it is half of what was before: a rate of a few percent
could otherwise fall to 0 unnoticed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from iterative_ppo.config import AlarmsConfig
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.evaluation.non_inferiority import Guardrail, NonInferiority, mean, proportion
from iterative_ppo.mdp import turn_table

OUTCOME, ACCEPTANCE, ABSTENTION, LENGTH = "outcome", "acceptance", "abstention", "characters"
Measures = Mapping[str, np.ndarray]
"""By name, (N,) values, one a conversation in the order of service; NaN where a conversation has none."""


@dataclass(frozen=True)
class Alarm:
    """A measure that became worse: its mean before and since, the loss that was allowed, and the evidence."""

    measure: str
    before: float
    since: float
    margin: float
    conversations: int
    p_value: float
    level: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.measure} {self.since:.4g} over {self.conversations} conversations, {self.before:.4g} in the A/B "
            f"test: worse by more than {self.margin:.3g} (p = {self.p_value:.2g} at level {self.level:.2g})"
        )


def measure(frame: pd.DataFrame, above: float = 0.0) -> dict[str, np.ndarray]:
    """Outcome (0 or 1), acceptance, abstention (shares of turns) and length (characters a suggestion) by conversation.

    Args:
        frame: a turn table of closed conversations, in the order of service.
        above: the R above which a conversation is a success.
    """
    status, adoption = frame["suggestion_status"], frame["adoption"]
    answered = adoption.isin(["verbatim", "edited", "rejected"])
    values = {
        OUTCOME: (frame["outcome"] > above, turn_table.last_rows(frame)),
        ACCEPTANCE: (adoption.isin(["verbatim", "edited"]), answered),
        ABSTENTION: (status.isin(["abstained"]), turn_table.actions(frame)),
        LENGTH: (frame["suggestion"].str.len(), status.isin(["suggested"])),
    }
    known = {name: np.where(rows, value.to_numpy(dtype=float), np.nan) for name, (value, rows) in values.items()}
    means = pd.DataFrame(known).groupby(frame["conversation_id"].to_numpy(dtype=object), sort=False).mean()
    return {name: means[name].to_numpy() for name in known}


def alarms(before: Measures, since: Measures, config: AlarmsConfig) -> tuple[Alarm, ...]:
    """The alarms of the last look that raises any; none where all is well, or too little is known.

    Args:
        before: in the A/B test that promoted. since: from the promotion on. Both by the names of `measure`.
    """
    checks = _checks(before, config)
    raised: tuple[Alarm, ...] = ()
    look, count = 1, config.conversations
    while count <= len(since[OUTCOME]):
        level = config.alpha / (len(checks) * look * (look + 1))
        seen = {name: values[:count] for name, values in since.items()}
        raised = tuple(alarm for check in checks if (alarm := _alarm(check, before, seen, count, level))) or raised
        look, count = look + 1, 2 * count
    return raised


def _checks(before: Measures, config: AlarmsConfig) -> list[Guardrail]:
    known = {name: values[np.isfinite(values)] for name, values in before.items()}
    usual = {name: float(values.mean()) if len(values) else 0.0 for name, values in known.items()}
    stretch = config.length_margin * usual[LENGTH]
    return [
        Guardrail(OUTCOME, "higher", min(config.margin, usual[OUTCOME] / 2), config.alpha),
        Guardrail(ACCEPTANCE, "higher", min(config.margin, usual[ACCEPTANCE] / 2), config.alpha),
        Guardrail(ABSTENTION, "lower", config.margin, config.alpha),
        Guardrail(LENGTH, "lower", stretch, config.alpha),
        Guardrail(LENGTH, "higher", stretch, config.alpha),
    ]


def _alarm(check: Guardrail, before: Measures, since: Measures, count: int, level: float) -> Alarm | None:
    first, second = (values[check.measure][np.isfinite(values[check.measure])] for values in (before, since))
    compare: Callable[..., NonInferiority] = _shares if check.measure == OUTCOME else mean
    found = compare(check, first, second)
    p_value = 1.0 - found.p_value  # of a loss beyond the margin, where non-inferiority tests for less
    if np.isnan(found.loss) or found.loss <= check.margin or p_value >= level:
        return None
    return Alarm(check.measure, found.champion, found.challenger, check.margin, count, p_value, level)


def _shares(check: Guardrail, before: np.ndarray, since: np.ndarray) -> NonInferiority:
    return proportion(check, *(Arm(int(values.sum()), len(values)) for values in (before, since)))
