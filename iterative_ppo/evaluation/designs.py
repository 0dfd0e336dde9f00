"""The designs of an A/B test behind one interface."""

from __future__ import annotations

from typing import Protocol

from iterative_ppo.config import ABTestConfig
from iterative_ppo.evaluation.e_process import EProcess
from iterative_ppo.evaluation.experiment import History, Look
from iterative_ppo.evaluation.fixed_sample import FixedSample
from iterative_ppo.evaluation.group_sequential import GroupSequential


class Design(Protocol):
    """How a running test is looked at. Promotion is one-sided at the test's level, however often one looks."""

    def look(self, history: History) -> Look:
        """What the matured conversations show. Raises TurnTableError for a faulty history."""
        ...


def design_of(config: ABTestConfig, alpha: float) -> Design:
    """The configured design."""
    designs: dict[str, type[FixedSample] | type[GroupSequential] | type[EProcess]] = {
        "fixed": FixedSample,
        "group_sequential": GroupSequential,
        "anytime": EProcess,
    }
    return designs[config.design](config, alpha)
