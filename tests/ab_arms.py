"""Two arms of an A/B test by their counts, as a history and as the decision of one look at the planned size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from iterative_ppo.config import ABTestConfig, load_config
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.evaluation.experiment import History, Look
from iterative_ppo.evaluation.fixed_sample import FixedSample
from iterative_ppo.evaluation.gate import Decision, outcome_gate


def history(champion: Arm, challenger: Arm, earlier: Sequence[Look] = (), seed: int = 0) -> History:
    """All matured, in an order of its own."""
    arms = (champion, challenger)
    which = np.repeat([False, True], [arm.conversations for arm in arms])
    outcome = np.concatenate([np.arange(arm.conversations) < arm.successes for arm in arms]).astype(float)
    order = np.random.default_rng(seed).permutation(len(which))
    return History(which[order], outcome[order], np.zeros(len(which)), 0.0, 0.0, earlier=tuple(earlier))


def abtest(**changes: object) -> ABTestConfig:
    return ABTestConfig.model_validate(load_config().abtest.model_dump() | changes)


def decided(champion: Arm, challenger: Arm, alpha: float = 0.05, planned: int | None = None) -> Decision:
    """Of a fixed sample; `planned` None means that all are here."""
    planned = planned or champion.conversations + challenger.conversations
    look = FixedSample(abtest(conversations=planned), alpha).look(history(champion, challenger))
    return outcome_gate(look)
