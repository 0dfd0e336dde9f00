"""Guardrails: what a challenger may not do worse than the champion, each a measure of what both of them say.

A measure is one function of a `Said`. The same ones serve the responses that both policies give in held-out states,
which are paired by state, and the conversations of an A/B test's arms, which are not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from iterative_ppo.config import GuardrailConfig
from iterative_ppo.errors import ConfigError, did_you_mean
from iterative_ppo.evaluation import pii
from iterative_ppo.evaluation.clusters import equal_businesses
from iterative_ppo.evaluation.degeneration import compression, repeated_ngrams, words
from iterative_ppo.evaluation.metrics import Calibration
from iterative_ppo.evaluation.non_inferiority import Guardrail, NonInferiority, quantile
from iterative_ppo.mdp.bisection import first_that
from iterative_ppo.mdp.returns import ACCEPTANCE
from iterative_ppo.mdp.turn_table import last_rows
from iterative_ppo.references import imported

LEAST_UNITS = 10
"""Below this the spread between conversations is itself too uncertain for a bound."""
MOST_UNITS = 100_000


@dataclass(frozen=True, eq=False)
class Said:
    """N responses of one policy, and what is known of them; what a source cannot know is None.

    Attributes:
        unit: (N,) ids of what was sampled or assigned as a whole, a conversation or a business.
        texts: (N,) "" where it abstained. pieces: (N,) the same as tokens or words.
        abstained: (N,) bool. finished: (N,) bool, whether the end of sequence came.
        log_ratio: (N,) own log-prob less the champion's, nats; 0 for the champion itself.
        adoption: (N,) what staff did with it: a key of `returns.ACCEPTANCE`, or None.
        reward: (N,) R of the conversation at its last response, NaN at the others.
        calibration: of Q, on conversations that it has not seen.
        conversation: (N,) ids, where units are businesses.
    """

    unit: np.ndarray
    texts: Sequence[str]
    pieces: Sequence[Sequence[Hashable]]
    abstained: np.ndarray
    finished: np.ndarray | None = None
    log_ratio: np.ndarray | None = None
    adoption: Sequence[str | None] | None = None
    reward: np.ndarray | None = None
    calibration: Calibration | None = None
    conversation: np.ndarray | None = None

    def of_units(self, units: Sequence[Hashable]) -> Said:
        """Those of some units alone."""
        rows = np.flatnonzero(np.isin(self.unit.astype(str), np.array(list(map(str, units)))))
        known = {name: getattr(self, name) for name in _OF_RESPONSES}
        chosen = {name: _rows(values, rows) for name, values in known.items() if values is not None}
        return replace(self, **chosen)

    @classmethod
    def of_turns(cls, frame: pd.DataFrame, unit: str = "conversation_id", rewarded: bool = False) -> Said:
        """What a policy suggested in the conversations of a turn table, for an arm of an A/B test.

        Args:
            rewarded: whether R is to be known too.
        """
        rows = frame[frame["suggestion_status"].isin(["suggested", "abstained"])]
        texts = rows["suggestion"].fillna("").astype(str).tolist()
        adoption = rows["adoption"].astype(object).where(rows["adoption"].notna(), None).tolist()
        abstained = (rows["suggestion_status"] == "abstained").to_numpy(dtype=bool)
        return cls(
            rows[unit].to_numpy(dtype=object),
            texts,
            [words(text) for text in texts],
            abstained,
            adoption=adoption if any(adoption) else None,
            reward=_worth(frame, rows) if rewarded else None,
            conversation=rows["conversation_id"].to_numpy(dtype=object),
        )


def _worth(frame: pd.DataFrame, rows: pd.DataFrame) -> np.ndarray:
    """(N,) R of each conversation of the table at its last one of these rows, NaN at the others."""
    total = frame.groupby("conversation_id", sort=False)["outcome"].sum()
    return np.where(last_rows(rows), rows["conversation_id"].map(total).to_numpy(dtype=float), np.nan)


def _rows(values: Any, rows: np.ndarray) -> Any:
    return values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]


_OF_RESPONSES = tuple(field.name for field in fields(Said) if field.name != "calibration")
Values = Callable[[Said], np.ndarray | None]
"""(N,) one number a response, NaN where the response does not count; None where its source cannot know."""
LIMIT = ", limit"
"""Ends the name of a guardrail's limit, which stands in the champion's place."""
CALIBRATION, REWARD = "calibration", "reward"


@dataclass(frozen=True)
class Measure:
    """What is compared: the mean of `values`, or a quantile of them; `relative` margins are shares of the champion's.

    `relative` suits lengths, whose usual size is the source's own. `rate`: the values are 0 or 1, and turns tell them.
    """

    values: Values
    quantile: float | None = None
    relative: bool = False
    rate: bool = False


def guarded(
    rules: Mapping[str, GuardrailConfig], champion: Said, challenger: Said, alpha: float
) -> tuple[NonInferiority, ...]:
    """Every guardrail that applies to these responses, and after it its limit, by the name `name, limit`.

    A guardrail whose measure is not a number, or of too few conversations, does not hold. Raises ConfigError for a
    function that is not there or returns something else than it should.
    """
    return tuple(found for name, rule in rules.items() for found in _guarded(name, rule, champion, challenger, alpha))


def harm(
    rules: Mapping[str, GuardrailConfig], champion: Said, challenger: Said, alpha: float, least: int
) -> str | None:
    """The first guardrail of which it is shown that the challenger breaks it, in words; None where none is.

    It may be asked at any time: the k-th look is at the first `least` 2^(k-1) units of the challenger, at a level of
    alpha / (m k (k + 1)) for each of m guardrails, as the alarms have it. Quantiles are left to the test's end.
    """
    units = list(dict.fromkeys(challenger.unit.tolist()))
    if len(units) < least:
        return None
    look = (len(units) // least).bit_length()
    seen = challenger.of_units(units[: least * 2 ** (look - 1)])
    means = {name: rule for name, rule in rules.items() if rule.function not in (CALIBRATION, REWARD)}
    means = {name: rule for name, rule in means.items() if measure_of(name, rule.function).quantile is None}
    level = alpha / (max(1, len(means)) * look * (look + 1))
    for found in guarded(means, champion, seen, level):
        if found.loss > found.margin and 1.0 - found.p_value < level:
            return f"guardrail {found.measure} {found.challenger:.4g}, champion {found.champion:.4g}: broken"
    return None


def _guarded(
    name: str, rule: GuardrailConfig, champion: Said, challenger: Said, alpha: float
) -> Iterator[NonInferiority]:
    if rule.function == CALIBRATION:
        if challenger.calibration is not None:
            yield calibrated(Guardrail(name, rule.direction, rule.margin, alpha), challenger.calibration)
        return
    measure = measure_of(name, rule.function)
    usual, new = _values(name, measure, champion), _values(name, measure, challenger)
    if usual is None and new is None:
        return
    usual, new = usual or NOTHING, new or NOTHING  # known of one of them alone, it cannot be compared
    yield from _both(name, rule, measure, usual, new, alpha)


def _both(
    name: str, rule: GuardrailConfig, measure: Measure, usual: Sample, new: Sample, alpha: float
) -> Iterator[NonInferiority]:
    """The guardrail, and its limit where it has one."""
    margin = rule.margin * (abs(_statistic(measure, usual)) if measure.relative else 1.0)
    yield _compared(measure, Guardrail(name, rule.direction, margin, alpha), usual, new)
    if rule.limit is not None:
        limit = replace(new, values=np.full(len(new.values), rule.limit))
        yield _compared(measure, Guardrail(f"{name}{LIMIT}", rule.direction, 0.0, alpha), limit, new)


def least_conversations(rules: Mapping[str, GuardrailConfig], alpha: float, size: int = 1) -> dict[str, int]:
    """Of each guardrail of a rate, by name: conversations an arm from which it holds where neither arm shows any event.

    Fewer never tell that a rare event stays rare, whatever the challenger. Rates that no size up to `MOST_UNITS` units
    tells are left out, and so are functions of one's own.

    Args:
        size: conversations of each unit that is assigned; 1 where that is a conversation.
    """
    rates = {name: rule for name, rule in rules.items() if rule.function in MEASURES and MEASURES[rule.function].rate}

    def told(units: int, name: str) -> bool:
        each = np.arange(units * size)
        none = Sample(np.zeros(len(each)), each // size, each)
        return all(found.holds for found in _both(name, rates[name], MEASURES[rates[name].function], none, none, alpha))

    least = {name: first_that(partial(told, name=name), LEAST_UNITS, MOST_UNITS + 1) for name in rates}
    return {name: units * size for name, units in least.items() if units <= MOST_UNITS}


def measure_of(name: str, function: str) -> Measure:
    """A measure of ours by name, or one of the user's own. Raises ConfigError where there is none."""
    where = f"gate.guardrails.{name}.function"
    if ":" not in function:
        if function not in MEASURES:
            known = [*MEASURES, CALIBRATION]
            hint = did_you_mean(function, known)
            raise ConfigError(f"{where}: {function!r} is none of {', '.join(known)}{hint}; your own is module:function")
        return MEASURES[function]
    return Measure(imported(function, where))


@dataclass(frozen=True, eq=False)
class Sample:
    """Values of the responses that count, the units that they were drawn in, and their conversations if others."""

    values: np.ndarray
    unit: np.ndarray
    conversation: np.ndarray | None = None

    @property
    def conversations(self) -> float:
        """How many, of equal size."""
        ids = self.unit if self.conversation is None else self.conversation
        return float(equal_businesses(np.unique(ids.astype(str), return_counts=True)[1]))


NOTHING = Sample(np.zeros(0), np.zeros(0, dtype=object))


def _values(name: str, measure: Measure, said: Said) -> Sample | None:
    values = measure.values(said)
    if values is None:
        return None
    values = np.asarray(values, dtype=float)
    if values.shape != (len(said.unit),):
        raise ConfigError(
            f"gate.guardrails.{name}: its function returned an array of shape {values.shape}, expected one number for "
            f"each of {len(said.unit)} responses"
        )
    counts = ~np.isnan(values)
    return Sample(values[counts], said.unit[counts], None if said.conversation is None else said.conversation[counts])


def _statistic(measure: Measure, sample: Sample) -> float:
    if not len(sample.values):
        return float("nan")
    if measure.quantile is None:
        return float(sample.values.mean())
    return float(np.quantile(sample.values, measure.quantile, method="inverted_cdf"))


def _compared(measure: Measure, rule: Guardrail, champion: Sample, challenger: Sample) -> NonInferiority:
    few = min(len(np.unique(champion.unit)), len(np.unique(challenger.unit))) < LEAST_UNITS
    if few or not np.isfinite(champion.values.sum() + challenger.values.sum()):
        nan = float("nan")
        ours, theirs = _statistic(measure, champion), _statistic(measure, challenger)
        return NonInferiority(rule.measure, ours, theirs, rule.margin, nan, nan, 1.0, False)
    if measure.quantile is None:
        return clustered_mean(rule, champion, challenger)
    units = champion.unit, challenger.unit
    return quantile(rule, champion.values, challenger.values, measure.quantile, units)


def clustered_mean(rule: Guardrail, champion: Sample, challenger: Sample) -> NonInferiority:
    """Difference of means, with the spread between units (a linearised ratio of sums, t with one less than the units).

    Units that hold responses of both, as held-out conversations do, are paired by that; those of an A/B test's arms,
    which hold one policy's only, count as independent, and t has the smaller arm's degrees of freedom.

    Of 0/1 values the variance is that of a loss of the margin (a score test), as if the events that are missing from it
    came in whole conversations: of none seen in n of them, about 3 / n may be missed at 5 %.
    """
    _, codes = np.unique(np.concatenate([champion.unit, challenger.unit]).astype(str), return_inverse=True)
    units = int(codes.max()) + 1
    parts = codes[: len(champion.unit)], codes[len(champion.unit) :]
    fewest = min(len(np.unique(part)) for part in parts)
    means = float(champion.values.mean()), float(challenger.values.mean())
    spread = [
        np.bincount(part, weights=sample.values - mean, minlength=units) / len(part)
        for part, sample, mean in zip(parts, (champion, challenger), means, strict=True)
    ]
    sign = 1.0 if rule.better == "lower" else -1.0
    loss = sign * (means[1] - means[0])
    variance = float(((spread[1] - spread[0]) ** 2).sum() * fewest / (fewest - 1))
    seen = _tested(rule, loss, variance, 0.0, fewest - 1)
    if not np.isin(challenger.values, (0.0, 1.0)).all():
        missed, (bound, p_value) = False, seen
    else:
        each = 1.0 / min(champion.conversations, challenger.conversations)
        bound, p_value = _tested(rule, loss, variance, each, fewest - 1)
        missed = seen[1] < rule.alpha <= p_value
    return NonInferiority(rule.measure, *means, rule.margin, loss, bound, p_value, p_value < rule.alpha, missed)


def _tested(rule: Guardrail, loss: float, variance: float, each: float, freedom: int) -> tuple[float, float]:
    """The loss's upper bound and the p-value of a loss of the margin.

    Args:
        variance: of the loss as it is seen. each: how much greater it is for each further unit of loss.
    """
    from scipy.stats import t

    square = float(t.isf(rule.alpha, freedom)) ** 2
    bound = loss + square * each / 2 + math.sqrt((square * each / 2) ** 2 + square * variance)
    error = math.sqrt(variance + each * max(0.0, rule.margin - loss))
    if error > 0:
        return bound, float(t.cdf((loss - rule.margin) / error, freedom))
    return bound, 0.0 if loss < rule.margin or loss <= rule.margin == 0 else 1.0


def calibrated(rule: Guardrail, found: Calibration) -> NonInferiority:
    """Whether Q's calibration error is within the margin of what chance gives a perfect Q (its 95th percentile)."""
    loss = found.error - found.chance_95
    holds = bool(loss < rule.margin)
    return NonInferiority(rule.measure, found.chance_95, found.error, rule.margin, loss, loss, float("nan"), holds)


def _lengths(said: Said) -> np.ndarray:
    """Characters, of what was suggested."""
    return np.where(said.abstained, np.nan, [float(len(text)) for text in said.texts])


def _repetition(said: Said) -> np.ndarray:
    return np.where(said.abstained, np.nan, [repeated_ngrams(piece) for piece in said.pieces])


def _compression(said: Said) -> np.ndarray:
    return np.where(said.abstained, np.nan, [compression(text) for text in said.texts])


def _acceptance(said: Said) -> np.ndarray | None:
    """1 sent verbatim, 1/2 edited, 0 rejected or unanswered; abstentions do not count."""
    if said.adoption is None:
        return None
    given = np.array([ACCEPTANCE.get(fate, np.nan) if fate else np.nan for fate in said.adoption], dtype=float)
    return np.where(said.abstained, np.nan, given)


MEASURES: dict[str, Measure] = {
    "kl": Measure(lambda said: said.log_ratio),
    "length": Measure(_lengths, relative=True),
    "length_p95": Measure(_lengths, quantile=0.95, relative=True),
    "unfinished": Measure(lambda said: None if said.finished is None else 1.0 - said.finished),
    "repetition": Measure(_repetition),
    "compression": Measure(_compression),
    "abstained": Measure(lambda said: said.abstained.astype(float), rate=True),
    "acceptance": Measure(_acceptance),
    "reward": Measure(lambda said: said.reward),
    "pii": Measure(lambda said: pii.by_pattern(said.texts), rate=True),
    "presidio": Measure(lambda said: pii.by_presidio(said.texts), rate=True),
}
"""Means over responses, unless said otherwise. kl: nats; lengths: characters; reward: R a conversation, where that is
more than a success; shares: in [0, 1]."""
