"""What a look at a running A/B test sees, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

import numpy as np

from iterative_ppo.config import ABTestConfig
from iterative_ppo.errors import ConfigError, TurnTableError
from iterative_ppo.evaluation.ab_test import level_of
from iterative_ppo.evaluation.clusters import by_business, cluster_comparison, equal_businesses
from iterative_ppo.evaluation.comparison import Comparison, Tally
from iterative_ppo.evaluation.sample_ratio import mismatch

DesignName = Literal["fixed", "group_sequential", "anytime"]
Verdict = Literal["promote", "continue", "stop_futile", "reject", "halt"]
LEAST_BUSINESSES = 20
"""Below this the variance by business is itself too uncertain for a bound from the normal distribution.

Where they are assigned, half of it in each arm, counted by their conversations: (sum n)^2 / sum n^2 equal ones (Kish).
"""


@dataclass(frozen=True)
class Look:
    """What a look found.

    Verdicts: promote; continue; stop_futile (a gain of the MDE is ruled out); reject (the plan's end, not better);
    halt (the test itself is at fault, or the challenger does harm). `statistic` is z or the e-value, `bound` what it
    must reach; None where the look spent nothing. Of the interval `low` to `high` of the gain each end holds at the
    test's one-sided level, over all looks at once. Pairs are (champion, challenger).
    """

    design: DesignName
    verdict: Verdict
    reasons: tuple[str, ...]
    fraction: float
    conversations: tuple[int, int]
    rates: tuple[float | None, float | None]
    design_effect: float | None = None
    statistic: float | None = None
    bound: float | None = None
    estimate: float | None = None
    low: float | None = None
    high: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict` reads it."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Look:
        """Raises ConfigError where fields are missing or unknown."""
        given: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        try:
            return cls(**given)
        except TypeError:
            expected = ", ".join(field.name for field in fields(cls))
            raise ConfigError(f"a look's record has the fields {', '.join(values)}; expected {expected}") from None


@dataclass(frozen=True)
class History:
    """An experiment up to now: its conversations of the ramp's last stage in order of assignment, and earlier looks.

    A conversation matures when its window ends, by the clock and never by its outcome: an outcome that comes early
    counts no earlier. Otherwise the arm whose outcomes come faster would look better.

    Args:
        challenger: (N,) bool, the arm. outcome: (N,) in [0, 1] within the window, 0 for none; NaN only while maturing.
        assigned: (N,) hours, rising. now: hours on the same clock. window: hours from assignment to maturity.
        business: (N,) ids, or None where businesses do not matter.
        earlier: the looks already taken, oldest first.

    Raises TurnTableError for arrays that cannot be this, naming the first row.
    """

    challenger: np.ndarray
    outcome: np.ndarray
    assigned: np.ndarray
    now: float
    window: float
    business: np.ndarray | None = None
    earlier: tuple[Look, ...] = ()

    def __post_init__(self) -> None:
        size = len(self.challenger)
        for name in ("outcome", "assigned", "business"):
            values = getattr(self, name)
            if values is not None and len(values) != size:
                raise TurnTableError(f"A/B test: {len(values)} values of {name} for {size} conversations")
        if self.challenger.dtype != bool:
            raise TurnTableError(f"A/B test: challenger is of type {self.challenger.dtype}, expected bool")
        _refuse(
            ~(np.diff(self.assigned, prepend=-np.inf) >= 0), "was assigned before the one above it; sort by assignment"
        )
        seen, outcome = self.assigned <= self.now - self.window, self.outcome
        _refuse(seen & np.isnan(outcome), "has matured without an outcome; no outcome within the window is 0")
        _refuse((outcome < 0) | (outcome > 1), "has an outcome outside [0, 1]; scale the outcomes' range to it")

    @property
    def matured(self) -> int:
        """How many have matured: the first so many in order of assignment."""
        return int(np.searchsorted(self.assigned, self.now - self.window, side="right"))

    def businesses(self, whole: bool) -> np.ndarray:
        """(N,) codes 0..G-1. With `whole`, raises TurnTableError for a business in both arms."""
        if self.business is None:
            raise TurnTableError("A/B test: abtest.unit is business but the conversations have no business id")
        names, codes = np.unique(self.business, return_inverse=True)
        if whole:
            mixed = np.bincount(codes, self.challenger) % np.bincount(codes) > 0
            if mixed.any():
                raise TurnTableError(
                    f"A/B test: business {str(names[mixed][0])!r} is in both arms, but businesses are assigned"
                )
        return np.asarray(codes)


def comparable(champion: Mapping[str, Any], challenger: Mapping[str, Any]) -> None:
    """Raises ConfigError where the arms are defined differently: outcome, window, unit, start, or whatever is given."""
    for key in sorted({*champion, *challenger}):
        if champion.get(key) != challenger.get(key):
            found = f"{champion.get(key)!r} for the champion and {challenger.get(key)!r} for the challenger"
            raise ConfigError(f"A/B test: the arms differ in {key}: {found}; arms may differ in their policy alone")


def opening(design: DesignName, history: History, config: ABTestConfig) -> tuple[Look, Comparison | None]:
    """The start of every look: an ended test stays ended, a faulty one halts, and arms are compared if they can be.

    The comparison is None where there is nothing to analyse; then the look is the answer.
    """
    ended = [look for look in history.earlier if look.verdict != "continue"]
    if ended:
        return ended[0], None
    seen = slice(0, history.matured)
    challenger, outcome = history.challenger[seen], history.outcome[seen]
    arms = outcome[~challenger], outcome[challenger]
    fraction = len(outcome) / config.conversations
    counts, rates = (len(arms[0]), len(arms[1])), tuple(float(arm.mean()) if len(arm) else None for arm in arms)
    look = Look(design, "continue", (), fraction, counts, (rates[0], rates[1]))
    codes = (
        None
        if history.business is None and config.unit == "conversation"
        else (history.businesses(whole=config.unit == "business"))
    )
    fault = mismatch(*_units(history, codes, config.unit), config.challenger_share, one_look=design == "fixed")
    if fault and (design != "fixed" or fraction >= 1):
        return replace(look, verdict="halt", reasons=(fault,)), None
    few = too_few_businesses(history) if config.unit == "business" else None
    if few:  # it says nothing of the challenger, at the plan's end either
        return replace(look, reasons=(few,)), None
    nothing = _nothing_to_compare(arms, None if codes is None else codes[seen])
    if nothing:
        return replace(look, verdict="reject" if fraction >= 1 else "continue", reasons=(nothing,)), None
    comparison = _compare(challenger, outcome, None if codes is None else codes[seen])
    return replace(look, design_effect=float(comparison.design_effect)), comparison


def too_few_businesses(history: History) -> str | None:
    """Why the matured conversations of assigned businesses cannot be compared, at the plan's end either; None if not.

    It depends on who was assigned alone, so that waiting for more spends nothing of the level.
    """
    seen = slice(0, history.matured)
    codes, challenger = history.businesses(whole=True)[seen], history.challenger[seen]
    for name, arm in (("champion", codes[~challenger]), ("challenger", codes[challenger])):
        worth = equal_businesses(np.bincount(arm))
        if worth < LEAST_BUSINESSES / 2:
            return (
                f"the {name}'s {len(arm)} conversations are those of {worth:.1f} businesses of equal size, at least "
                f"{LEAST_BUSINESSES // 2} are needed in each arm; the test goes on until more businesses come, beyond "
                f"the plan's end if need be; where none will, end it with `ippo abtest --stop` and give the {name} a "
                "larger share"
            )
    return None


def interval(gain: float, half: float) -> tuple[float, float]:
    """Gain and half a width, no wider than a difference of outcomes in [0, 1] can be."""
    return max(-1.0, gain - half), min(1.0, gain + half)


def measured(look: Look, alpha: float) -> str:
    """The arms in words, with the level of the gain's interval."""
    interval = f"{level_of(alpha)} interval {look.low:+.1%} to {look.high:+.1%}"
    return (
        f"challenger {look.rates[1]:.1%} of {look.conversations[1]}, champion {look.rates[0]:.1%} of "
        f"{look.conversations[0]}: {look.estimate:+.1%} ({interval})"
    )


def concluded(look: Look, promote: bool, mde: float | None, alpha: float) -> Look:
    """The look at one-sided `alpha` with its verdict and reasons.

    Args:
        mde: a gain of it that is ruled out before the end is futile.
    """
    test = f"{'z' if look.design != 'anytime' else 'e-value'} {look.statistic:.4g}, bound {look.bound:.4g}"
    if promote:
        verdict: Verdict = "promote"
        reason = f"better: {test}"
    elif look.fraction >= 1:
        verdict, reason = "reject", f"not shown to be better at the plan's end: {test}"
    elif mde is not None and look.high is not None and look.high < mde:
        verdict, reason = "stop_futile", f"a gain of {mde:+.1%} is ruled out: {test}"
    else:
        verdict, reason = "continue", f"nothing shown at {look.fraction:.0%} of the plan: {test}"
    return replace(look, verdict=verdict, reasons=(reason, measured(look, alpha)))


def _compare(challenger: np.ndarray, outcome: np.ndarray, codes: np.ndarray | None) -> Comparison:
    if codes is None:
        return Comparison(Tally.of(outcome[~challenger]), Tally.of(outcome[challenger]))
    return cluster_comparison(by_business(codes, outcome, ~challenger), by_business(codes, outcome, challenger))


def _nothing_to_compare(arms: tuple[np.ndarray, np.ndarray], codes: np.ndarray | None) -> str | None:
    for name, arm in zip(("champion", "challenger"), arms, strict=True):
        if not len(arm):
            return f"the {name}'s arm holds no matured conversation"
    outcome = np.concatenate(arms)
    if np.ptp(outcome) == 0:
        return (
            f"all {len(outcome)} matured outcomes are {outcome[0]:g}: nothing tells the arms apart; see whether "
            "outcomes are reported still, and set abtest.success_above where all of them are above 0"
        )
    if codes is not None and len(np.unique(codes)) < LEAST_BUSINESSES:
        return f"{len(np.unique(codes))} businesses have matured conversations, at least {LEAST_BUSINESSES} are needed"
    return None


def _units(history: History, codes: np.ndarray | None, unit: str) -> tuple[int, int]:
    """Units assigned to champion and challenger, matured or not."""
    challenger = history.challenger
    if unit == "business" and codes is not None:
        challenger = challenger[np.unique(codes, return_index=True)[1]]
    return int((~challenger).sum()), int(challenger.sum())


def _refuse(wrong: np.ndarray, what: str) -> None:
    if wrong.any():
        raise TurnTableError(f"A/B test: conversation {int(np.argmax(wrong))} {what}")
