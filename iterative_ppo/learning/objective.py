"""What Q is about under a configuration: its heads, their weights, and the range of what they say."""

from __future__ import annotations

from collections.abc import Mapping

from iterative_ppo.config import Config

WITHOUT_COST = -1e-9
"""Just below the R of a conversation that cost nothing."""


def head_weights(config: Config) -> dict[str, float]:
    """Name and weight of what each head of Q learns: the named outcomes, or one reward."""
    if config.improve.reward == "acceptance":
        return {"acceptance": 1.0}
    if config.credit.assigner != "outcome":
        return {"credit": 1.0}
    return dict(config.outcomes) if config.q.outcome_heads else {"outcome": 1.0}


def head_range(config: Config) -> tuple[float, float]:
    """Least and greatest of a head without a range of its own: an outcome, their sum, acceptance, or credited returns.

    ITPO's are normalised so that what is to come of them is within 1 (credit/rewards.py:token_rewards), but without
    discount: with it, early rewards weigh more than later ones of the other sign that make up for them, and a return of
    T turns may be as far from 0 as 2 - gamma^(T - 1).
    """
    if config.improve.reward == "acceptance":
        return 0.0, 1.0
    if config.credit.assigner == "itpo":
        return -2.0, 2.0
    if config.credit.assigner == "norm_itpo":
        low, high = outcome_range(config)
        return min(0.0, low), max(0.0, high)
    if not config.q.outcome_heads:
        return outcome_range(config)
    return config.data.range_of()


def own_ranges(config: Config) -> dict[str, tuple[float, float]]:
    """Least and greatest value of the heads that have a range of their own, by name: of named outcomes alone."""
    named = config.improve.reward == "outcome" and config.credit.assigner == "outcome" and config.q.outcome_heads
    return dict(config.data.outcome_ranges) if named else {}


def outcome_range(config: Config) -> tuple[float, float]:
    """Least and greatest R, the weighted sum of the outcomes."""
    worth = [[weight * end for end in config.data.range_of(name)] for name, weight in config.outcomes.items()]
    return sum(map(min, worth)), sum(map(max, worth))


def success_above(config: Config) -> float:
    """The R above which a conversation is a success: 0; of costs alone, where 0 is the best, just below it."""
    if config.abtest.success_above is not None:
        return config.abtest.success_above
    return WITHOUT_COST if outcome_range(config)[1] <= 0 else 0.0


def usual_success(outcomes: Mapping[str, float]) -> float:
    """The same by the weights of outcomes alone, of 0 and more each, where no other threshold is known."""
    return WITHOUT_COST if outcomes and max(outcomes.values()) <= 0 else 0.0


def more_than_success(config: Config) -> bool:
    """Whether R says more than that a conversation succeeded: of several outcomes, or of some that cost."""
    return len(config.outcomes) > 1 or outcome_range(config)[0] < 0
