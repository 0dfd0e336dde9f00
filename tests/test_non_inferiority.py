"""Guardrails: score, Welch and bootstrap tests against a margin, in the measure's good direction."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import optimize, stats

from iterative_ppo.errors import ConfigError, TurnTableError
from iterative_ppo.evaluation.ab_test import Arm
from iterative_ppo.evaluation.non_inferiority import Guardrail, mean, proportion, quantile, score_z

ACCEPTANCE = Guardrail("acceptance", "higher", 0.05, 0.05)
PII = Guardrail("PII", "lower", 0.01, 0.05)
LENGTH = Guardrail("length", "lower", 3.0, 0.05)


def constrained_z(worse: Arm, base: Arm, difference: float) -> float:
    """The score statistic with its restricted rates found by maximising the likelihood."""

    def surprise(low: float) -> float:
        rates = [(worse, low + difference), (base, low)]
        return -sum(stats.binom.logpmf(arm.successes, arm.conversations, p) for arm, p in rates)

    ends = max(0.0, -difference), min(1.0, 1.0 - difference)
    inside = optimize.minimize_scalar(surprise, bounds=ends, method="bounded", options={"xatol": 1e-10}).x
    low = min([*ends, float(inside)], key=surprise)
    total = worse.conversations + base.conversations
    parts = [(low + difference, worse.conversations), (low, base.conversations)]
    variance = sum(p * (1 - p) / n for p, n in parts) * total / (total - 1)
    return (worse.rate - base.rate - difference) / math.sqrt(variance)


@pytest.mark.parametrize("difference", [-0.1, -0.02, 0.02, 0.1])
@pytest.mark.parametrize(
    ("worse", "base"),
    [
        (Arm(610, 1000), Arm(630, 1000)),
        (Arm(50, 1000), Arm(50, 1000)),
        (Arm(0, 1000), Arm(0, 1000)),
        (Arm(0, 100), Arm(2, 3000)),
        (Arm(3, 3), Arm(0, 3)),
        (Arm(40, 40), Arm(200, 200)),
    ],
)
def test_the_score_statistic_is_that_of_the_restricted_likelihood(worse: Arm, base: Arm, difference: float) -> None:
    assert score_z(worse, base, difference) == pytest.approx(constrained_z(worse, base, difference), abs=2e-4)


def test_the_bound_and_the_p_value_agree() -> None:
    """By the same test: the loss that is just refuted at 5 % is the bound."""
    found = proportion(ACCEPTANCE, champion=Arm(630, 1000), challenger=Arm(610, 1000))
    assert found.loss == pytest.approx(0.02) and not found.holds and found.loss_bound > 0.05
    at_bound = Guardrail("acceptance", "higher", found.loss_bound, 0.05)
    assert proportion(at_bound, Arm(630, 1000), Arm(610, 1000)).p_value == pytest.approx(0.05, abs=1e-6)


def test_the_good_direction_decides() -> None:
    up, down = Guardrail("x", "higher", 0.05, 0.05), Guardrail("x", "lower", 0.05, 0.05)
    low, high = Arm(500, 1000), Arm(600, 1000)
    assert proportion(up, champion=low, challenger=high).holds and not proportion(up, high, low).holds
    assert proportion(down, champion=high, challenger=low).holds and not proportion(down, low, high).holds
    assert proportion(up, high, low).loss == pytest.approx(proportion(down, low, high).loss)


def test_rare_events_need_enough_conversations() -> None:
    """No event in either arm: 1,000 conversations rule out a point more, 100 do not."""
    assert proportion(PII, Arm(0, 1000), Arm(0, 1000)).holds
    assert not proportion(PII, Arm(0, 100), Arm(0, 100)).holds
    assert not proportion(PII, Arm(2, 3000), Arm(0, 100)).holds


@pytest.mark.parametrize(("base", "sizes"), [(0.01, (1500, 1500)), (0.3, (2000, 300))])
def test_a_challenger_worse_by_the_margin_passes_in_at_most_alpha(base: float, sizes: tuple[int, int]) -> None:
    rng, draws, margin = np.random.default_rng(0), 4000, 0.02
    champions, challengers = rng.binomial(sizes[0], base, draws), rng.binomial(sizes[1], base + margin, draws)
    counts = list(zip(champions.tolist(), challengers.tolist(), strict=True))
    reached = {c: score_z(Arm(c[1], sizes[1]), Arm(c[0], sizes[0]), margin) <= -1.6449 for c in set(counts)}
    share = np.mean([reached[c] for c in counts])
    assert 0.02 < share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / draws)


def test_means_are_welchs() -> None:
    rng = np.random.default_rng(0)
    champion, challenger = rng.normal(20, 4, 300), rng.normal(21, 9, 200)
    found = mean(LENGTH, champion, challenger)
    test = stats.ttest_ind(challenger, champion + 3.0, equal_var=False, alternative="less")
    assert found.p_value == pytest.approx(test.pvalue) and found.holds == (test.pvalue < 0.05)
    again = mean(Guardrail("length", "lower", found.loss_bound, 0.05), champion, challenger)
    assert again.p_value == pytest.approx(0.05)
    turned = mean(Guardrail("length", "higher", 3.0, 0.05), -champion, -challenger)
    assert turned.loss_bound == pytest.approx(found.loss_bound)


def test_values_that_do_not_vary_are_compared_as_they_are() -> None:
    assert mean(LENGTH, np.full(9, 20.0), np.full(5, 22.0)).holds
    assert not mean(LENGTH, np.full(9, 20.0), np.full(5, 23.0)).holds


def test_the_bootstrap_of_p95_covers() -> None:
    """Lengths whose true p95 differ by exactly the margin pass in about alpha of the tests."""
    rng, passed = np.random.default_rng(0), 0
    guardrail = Guardrail("p95 length", "lower", 3.0, 0.1)
    for seed in range(30):
        champion, challenger = rng.normal(20, 5, 400), rng.normal(23, 5, 400)
        passed += quantile(guardrail, champion, challenger, seed=seed).holds
    assert passed / 30 <= 0.1 + 3 * math.sqrt(0.09 / 30)
    assert quantile(guardrail, rng.normal(20, 5, 400), rng.normal(20, 5, 400)).holds


def test_groups_are_resampled_whole() -> None:
    """Ten copies of each value are no more evidence than one."""
    rng = np.random.default_rng(0)
    champion, challenger = rng.normal(20, 5, 60), rng.normal(20, 5, 60)
    codes = np.repeat(np.arange(60), 10)
    once = quantile(LENGTH, champion, challenger)
    copied = quantile(LENGTH, np.repeat(champion, 10), np.repeat(challenger, 10), groups=(codes, codes))
    alone = quantile(LENGTH, np.repeat(champion, 10), np.repeat(challenger, 10))
    assert copied.loss_bound == pytest.approx(once.loss_bound, abs=0.5) and alone.loss_bound < once.loss_bound - 0.5


def test_what_cannot_be_told_does_not_hold() -> None:
    one = np.ones(1)
    for found in (proportion(PII, Arm(0, 0), Arm(0, 9)), mean(LENGTH, one, np.ones(9)), quantile(LENGTH, one, one)):
        assert not found.holds and "cannot tell" in found.reason
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["loss"] is None


def test_bad_values_and_guardrails_are_refused() -> None:
    with pytest.raises(TurnTableError, match="guardrail length: value 1 is nan"):
        mean(LENGTH, np.array([1.0, np.nan]), np.ones(2))
    for margin, alpha in ((-0.1, 0.05), (0.1, 0.0)):
        with pytest.raises(ConfigError, match="guardrail x: margin"):
            Guardrail("x", "lower", margin, alpha)
