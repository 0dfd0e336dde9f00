"""The designs of the A/B test: published bounds, hand-made cases, error rates under nulls, and histories that lie."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from iterative_ppo.config import ABTestConfig, load_config
from iterative_ppo.errors import ConfigError, TurnTableError
from iterative_ppo.evaluation import replications as many
from iterative_ppo.evaluation.ab_test import Arm, ab_test
from iterative_ppo.evaluation.clusters import business_means, by_business, cluster_comparison
from iterative_ppo.evaluation.comparison import Comparison, Tally
from iterative_ppo.evaluation.designs import design_of
from iterative_ppo.evaluation.e_process import confidence_sequence, log_e_process, nearest_pairs
from iterative_ppo.evaluation.experiment import History, Look, comparable
from iterative_ppo.evaluation.inference import inference
from iterative_ppo.evaluation.plan import coarse, fixed_sample, group_sequential_stops, plan, too_few
from iterative_ppo.evaluation.ramp import Ramp
from iterative_ppo.evaluation.sample_ratio import e_value, mismatch, one_look_p
from iterative_ppo.evaluation.spending import crossing, obrien_fleming_spent, upper_bounds

ALPHA = 0.05
FIVE = [0.2, 0.4, 0.6, 0.8, 1.0]


def config(**changes: Any) -> ABTestConfig:
    return load_config(None, {f"abtest.{key}": value for key, value in changes.items()}).abtest


def history(
    rates: tuple[float, float], size: int, seed: int = 0, matured: int | None = None, **changes: Any
) -> History:
    """One conversation an hour, half of them the challenger's; a window of 10 hours; `matured` of them have matured."""
    rng = np.random.default_rng(seed)
    challenger = rng.random(size) < 0.5
    outcome = (rng.random(size) < np.where(challenger, rates[1], rates[0])).astype(float)
    now = (size if matured is None else matured) - 1 + 10.0
    return History(challenger, outcome, np.arange(size, dtype=float), now, 10.0, **changes)


# --- bounds ----------------------------------------------------------------------------------------------------------


def test_the_bounds_are_the_published_ones() -> None:
    """Lan-DeMets O'Brien-Fleming at one-sided .025, five equal looks."""
    assert upper_bounds(FIVE, 0.025) == pytest.approx([4.8769, 3.3570, 2.6803, 2.2898, 2.0310], abs=1e-4)


def test_one_look_is_the_ordinary_test() -> None:
    assert upper_bounds([1.0], ALPHA) == pytest.approx([stats.norm.isf(ALPHA)], abs=1e-8)


@pytest.mark.parametrize("fractions", [[0.1, 0.15, 0.7, 1.0], [0.3, 0.301, 1.2], [0.02, 0.5, 0.97, 1.0]])
def test_unequal_looks_spend_what_they_may_and_the_last_all_that_is_left(fractions: list[float]) -> None:
    bounds = upper_bounds(fractions, ALPHA)
    spent = np.cumsum(crossing(fractions, bounds)[0])
    assert spent == pytest.approx([obrien_fleming_spent(t, ALPHA) for t in fractions], abs=1e-6)
    assert spent[-1] == pytest.approx(ALPHA, abs=1e-8)


def test_crossing_probabilities_are_those_of_simulated_walks() -> None:
    fractions, drift, lower = [0.15, 0.5, 0.6, 1.0], 2.0, [-1.0, 0.2, 0.5, 1.0]
    upper = upper_bounds(fractions, ALPHA)
    lower[-1] = upper[-1]
    steps = np.diff(fractions, prepend=0.0)
    rng = np.random.default_rng(0)
    z = np.cumsum(rng.normal(drift * steps, np.sqrt(steps), (200_000, 4)), axis=1) / np.sqrt(fractions)
    going, above, below = np.ones(len(z), dtype=bool), [], []
    for k in range(4):
        above.append((going & (z[:, k] > upper[k])).mean())
        below.append((going & (z[:, k] < lower[k])).mean())
        going &= (z[:, k] < upper[k]) & (z[:, k] > lower[k])
    expected = crossing(fractions, upper, lower, drift)
    assert above == pytest.approx(expected[0], abs=4 * 0.5 / math.sqrt(200_000))
    assert below == pytest.approx(expected[1], abs=4 * 0.5 / math.sqrt(200_000))
    assert np.sum(expected) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("fractions", [[], [0.0, 1.0], [0.5, 0.5], [0.6, 0.4]])
def test_fractions_that_do_not_rise_are_an_error(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match="must be positive and rise"):
        upper_bounds(fractions, ALPHA)


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [(200, 1000, 250, 1000), (30, 150, 20, 140), (1, 50, 4, 60), (0, 40, 5, 40)])
def test_z_is_that_of_statsmodels_score_test(counts: tuple[int, int, int, int]) -> None:
    x, n, y, m = counts
    arms = Comparison(Tally(*map(np.array, (n, x, x))), Tally(*map(np.array, (m, y, y))))
    assert stats.norm.sf(arms.z) == pytest.approx(ab_test(Arm(x, n), Arm(y, m), ALPHA).p_value, rel=1e-9)


def test_the_design_effect_is_one_and_size_less_one_times_the_correlation() -> None:
    """Businesses of 20 at correlation .05, assigned whole: 1.95; conversations assigned within them: no more than 1."""
    world = many.businesses(0.3, 0.0, 4000, 20, 0.05)(np.random.default_rng(0), 1)
    whole = float(many.compared(world, world.outcome.shape[1]).design_effect[0])
    assert whole == pytest.approx(1.95, abs=0.15)
    mixed = replace(world, challenger=np.random.default_rng(1).random(world.outcome.shape) < 0.5)
    assert 0.9 < float(many.compared(mixed, world.outcome.shape[1]).design_effect[0]) < 1.1


def test_businesses_of_one_conversation_change_nothing() -> None:
    seen = history((0.3, 0.35), 2000)
    codes = np.arange(2000)
    arms = cluster_comparison(
        by_business(codes, seen.outcome, ~seen.challenger), by_business(codes, seen.outcome, seen.challenger)
    )
    plain = Comparison(Tally.of(seen.outcome[~seen.challenger]), Tally.of(seen.outcome[seen.challenger]))
    assert (float(arms.gain), float(arms.z)) == pytest.approx((float(plain.gain), float(plain.z)), rel=0.01)


def test_a_large_gain_does_not_widen_its_own_interval() -> None:
    """Businesses that are alike leave the plain standard error, whatever the gain; the score test may lose by it."""
    seen = history((0.2, 0.7), 3000)
    codes = np.arange(3000) % 30
    arms = cluster_comparison(
        by_business(codes, seen.outcome, ~seen.challenger), by_business(codes, seen.outcome, seen.challenger)
    )
    plain = Comparison(Tally.of(seen.outcome[~seen.challenger]), Tally.of(seen.outcome[seen.challenger]))
    assert float(arms.error) == pytest.approx(float(plain.error), rel=0.4)
    assert float(arms.z) > 4.0


@pytest.mark.parametrize("whole", [True, False], ids=["businesses assigned", "conversations assigned"])
def test_intervals_of_correlated_businesses_cover_a_large_gain(whole: bool) -> None:
    """40 businesses of 20 with an ICC of about .05, a gain of .3: two-sided 95 % of the gain and its error."""
    rng = np.random.default_rng(0)
    own = np.clip(0.3 + 0.1 * rng.standard_normal((1500, 40)), 0.01, 0.69)
    mine = np.zeros((1500, 40), dtype=int)
    mine[:] = np.where(np.arange(40) % 2, 20, 0) if whole else 10
    counts = 20 - mine, mine
    totals = rng.binomial(counts[0], own), rng.binomial(counts[1], own + 0.3)
    champion, challenger = (
        Tally(n.astype(float), t.astype(float), t.astype(float)) for n, t in zip(counts, totals, strict=True)
    )
    arms = cluster_comparison(champion, challenger)
    covered = np.mean(np.abs(arms.gain - 0.3) <= 1.96 * arms.error)
    assert 0.92 < covered < 0.98


@pytest.mark.parametrize(("icc", "least"), [(0.05, 0.915), (0.2, 0.86)])
def test_the_upper_end_allows_for_an_arm_of_few_businesses(icc: float, least: float) -> None:
    """About 12 of 60, and few successes: it ends tests and rounds. Of normal quantiles it covered up to .02 less."""
    rng, experiments, weight = np.random.default_rng(7), 3000, (1 - icc) / icc
    mine = rng.permuted(np.tile(np.arange(60) < 12, (experiments, 1)), axis=1) * 40.0
    won = rng.binomial(40, rng.beta(0.05 * weight, 0.95 * weight, mine.shape)).astype(float)
    theirs, ours = won * (mine == 0), won * (mine > 0)
    arms = cluster_comparison(Tally(40 - mine, theirs, theirs), Tally(mine, ours, ours))
    assert (arms.freedom == 11).all()
    high, normal = arms.half_width(stats.norm.isf(ALPHA)), stats.norm.isf(ALPHA) * arms.error
    assert high == pytest.approx(stats.t.isf(ALPHA, 11) * arms.error)
    covered, before = (float(np.mean(arms.gain + end >= 0)) for end in (high, normal))
    assert covered > max(least, before + 0.01)


def test_a_business_counts_once_it_is_complete() -> None:
    rows, means = business_means(np.array([0, 1, 0, 1, 2, 1, 0]), np.array([1.0, 0, 0, 1, 1, 0, 0]), 2)
    assert rows.tolist() == [2, 3] and means.tolist() == [0.5, 0.5]


def test_pairs_are_nearest_and_never_change() -> None:
    challenger = np.array([0, 0, 1, 1, 1, 1, 0, 0, 0], dtype=bool)
    first, second = nearest_pairs(challenger)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(1, 2), (0, 3), (6, 5), (7, 4)]
    drawn = np.random.default_rng(0).random(500) < 0.3
    whole = np.stack(nearest_pairs(drawn), axis=1)
    for size in (0, 1, 77, 300):
        begun = np.stack(nearest_pairs(drawn[:size]), axis=1)
        assert (whole[: len(begun)] == begun).all()
    assert not drawn[whole[:, 0]].any() and drawn[whole[:, 1]].all() and len(np.unique(whole)) == whole.size


# --- e-process -------------------------------------------------------------------------------------------------------


def by_hand(champion: np.ndarray, challenger: np.ndarray, mde: float) -> float:
    """The e-value from its definition, one pair after the other."""
    wealth = []
    for delta in (mde / 2, mde, 2 * mde):
        stake, successes = 1.0, 0.5
        for k, (a, b) in enumerate(zip(champion, challenger, strict=True)):
            p = successes / (2 * k + 1)
            h = min(delta / 2, 0.999 * min(p, 1 - p))
            stake *= (1 - h / p) if a else (1 + h / (1 - p))
            stake *= (1 + h / p) if b else (1 - h / (1 - p))
            successes += a + b
        wealth.append(stake)
    return float(np.mean(wealth))


@pytest.mark.parametrize("rate", [0.02, 0.4])
def test_the_e_process_is_its_definition(rate: float) -> None:
    rng = np.random.default_rng(1)
    champion, challenger = (rng.random((2, 300)) < rate).astype(float)
    assert np.exp(log_e_process(champion, challenger, 0.05)[-1]) == pytest.approx(by_hand(champion, challenger, 0.05))


@pytest.mark.parametrize(("champion", "challenger", "margin"), [(0.3, 0.3, 0.0), (0.02, 0.02, 0.0), (0.3, 0.4, 0.1)])
def test_no_bet_gains_on_average_where_the_null_holds(champion: float, challenger: float, margin: float) -> None:
    """After any past the next pair's expected factor is at most 1: exactly, from the four outcomes of a pair."""
    rng = np.random.default_rng(2)
    for size in (0, 1, 3, 40):
        past = (rng.random((2, size)) < 0.5).astype(float)
        before = np.exp(log_e_process(*past, 0.05, margin)[-1]) if size else 1.0
        expected = 0.0
        for a, b in [(0, 0), (0, 1), (1, 0), (1, 1)]:
            chance = abs(1 - a - champion) * abs(1 - b - challenger)
            pair = np.array([[a], [b]], dtype=float)
            expected += chance * np.exp(log_e_process(*np.hstack([past, pair]), 0.05, margin)[-1])
        assert expected <= before * (1 + 1e-9)


def test_the_confidence_sequence_passes_nought_with_the_verdict() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        champion, challenger = (rng.random((2, 800)) < np.array([[0.3], [0.38]])).astype(float)
        promoted = log_e_process(champion, challenger, 0.05).max() >= -math.log(ALPHA)
        low, high = confidence_sequence(champion, challenger, 0.05, ALPHA)
        assert (low > 0) == promoted and -1 < low < high < 1


# --- looks -----------------------------------------------------------------------------------------------------------


def nights(design: str, whole: History, settings: ABTestConfig, step: int) -> Look:
    """Look every `step` conversations until the test ends."""
    test, taken = design_of(settings.model_copy(update={"design": design}), ALPHA), ()
    for matured in range(step, len(whole.outcome) + 1, step):
        look = test.look(replace(whole, now=matured - 1 + whole.window, earlier=taken))
        taken = (*taken, Look.from_dict(json.loads(json.dumps(look.as_dict()))))
        if look.verdict != "continue":
            break
    return look


@pytest.mark.parametrize("design", ["fixed", "group_sequential", "anytime"])
def test_every_design_promotes_the_better_and_not_the_worse(design: str) -> None:
    settings = config(conversations=2000, mde=0.05)
    better = nights(design, history((0.3, 0.4), 2000), settings, 100)
    assert better.verdict == "promote" and better.low is not None and better.low > 0
    worse = nights(design, history((0.3, 0.25), 2000), settings, 100)
    assert worse.verdict in ("stop_futile", "reject") and worse.high is not None and worse.high < 0.05


@pytest.mark.parametrize("design", ["fixed", "group_sequential", "anytime"])
def test_the_simulated_designs_are_the_real_ones(design: str) -> None:
    """The proof of error rates speaks of the product: the same experiments, one look at a time, end the same way."""
    size, mde = 1500, 0.06
    settings = config(conversations=size, mde=mde, looks=5)
    fast = {
        "fixed": many.sequential([1.0], ALPHA),
        "group_sequential": many.sequential(FIVE, ALPHA, mde=mde),
        "anytime": many.anytime(mde, ALPHA),
    }[design]
    world = many.textbook(0.3, 0.05, size)(np.random.default_rng(3), 40)
    real = []
    for arm, outcome in zip(world.challenger, world.outcome, strict=True):
        whole = History(arm, outcome, np.arange(size, dtype=float), 0.0, 5.0)
        real.append(nights(design, whole, settings, size if design == "anytime" else 100).verdict == "promote")
    assert real == fast(world).tolist() and 5 < sum(real) < 35


def test_a_look_is_spent_only_when_it_is_due() -> None:
    settings = config(conversations=1000, looks=5)
    test = design_of(settings, ALPHA)
    early = test.look(history((0.3, 0.3), 1000, matured=199))
    assert (early.verdict, early.statistic) == ("continue", None) and "next look at 200" in early.reasons[0]
    first = test.look(history((0.3, 0.3), 1000, matured=250))
    assert first.bound == pytest.approx(upper_bounds([0.25], ALPHA)[0])
    between = test.look(history((0.3, 0.3), 1000, matured=399, earlier=(first,)))
    assert between.statistic is None and "next look at 400" in between.reasons[0]
    second = test.look(history((0.3, 0.3), 1000, matured=400, earlier=(first, between)))
    assert second.bound == pytest.approx(upper_bounds([0.25, 0.4], ALPHA)[1])


def test_an_ended_test_stays_as_it_ended() -> None:
    settings = config(conversations=1000)
    ended = design_of(settings, ALPHA).look(history((0.3, 0.3), 1000))
    assert ended.verdict == "reject" and ended.fraction == 1.0
    again = design_of(settings, ALPHA).look(history((0.0, 0.9), 3000, earlier=(ended,)))
    assert again == ended


@pytest.mark.parametrize("design", ["fixed", "group_sequential", "anytime"])
def test_only_matured_conversations_count_and_by_the_clock(design: str) -> None:
    """Outcomes that are known before their window ends change nothing, however loud."""
    settings = config(conversations=1000, design=design)
    whole = history((0.3, 0.3), 1500, matured=1000)
    silent = replace(whole, outcome=np.where(np.arange(1500) < 1000, whole.outcome, np.nan))
    loud = replace(whole, outcome=np.where(np.arange(1500) < 1000, whole.outcome, whole.challenger.astype(float)))
    looks = [design_of(settings, ALPHA).look(seen) for seen in (silent, loud)]
    assert looks[0] == looks[1] and sum(looks[0].conversations) == 1000


def test_a_gain_worth_having_that_is_ruled_out_ends_the_test() -> None:
    look = design_of(config(conversations=4000, mde=0.05), ALPHA).look(history((0.3, 0.22), 4000, matured=2400))
    assert look.verdict == "stop_futile" and look.high is not None and look.high < 0.05
    assert "a gain of +5.0% is ruled out" in look.reasons[0]


def test_reasons_tell_the_figures() -> None:
    look = design_of(config(conversations=2000), ALPHA).look(history((0.3, 0.4), 2000))
    assert look.verdict == "promote" and "z" in look.reasons[0] and "bound" in look.reasons[0]
    assert f"of {look.conversations[1]}" in look.reasons[1]


@pytest.mark.parametrize("design", ["fixed", "group_sequential"])
def test_no_interval_is_wider_than_a_gain_can_be(design: str) -> None:
    test = config(conversations=20, design=design)
    low, high = (design_of(test, ALPHA).look(seen) for seen in (history((1.0, 0.0), 20), history((0.0, 1.0), 20)))
    assert low.low == -1.0 and high.high == 1.0


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_sample_ratio_mismatch_halts_whatever_the_outcomes() -> None:
    rng = np.random.default_rng(0)
    challenger = rng.random(3000) < 0.42
    seen = History(challenger, challenger.astype(float), np.arange(3000.0), 3010.0, 10.0)
    for design in ("fixed", "group_sequential", "anytime"):
        look = design_of(config(design=design), ALPHA).look(seen)
        assert look.verdict == "halt" and "sample-ratio mismatch" in look.reasons[0]


def test_sample_ratio_tests_are_their_formulas() -> None:
    assert one_look_p(520, 480, 0.5) == pytest.approx(2 * stats.norm.sf(40 / math.sqrt(1000)))
    beta = stats.beta(0.2 * 300, 0.8 * 300)
    grid = np.linspace(0.0005, 0.9995, 1000)
    mixed = np.mean(beta.pdf(grid) * (grid / 0.2) ** 30 * ((1 - grid) / 0.8) ** 90)
    assert e_value(np.array(90), np.array(30), 0.2) == pytest.approx(mixed, rel=1e-3)
    assert mismatch(500, 500, 0.5, one_look=True) is None and mismatch(0, 0, 0.5, one_look=True) is None


@pytest.mark.parametrize("arm", [0, 1])
def test_an_empty_arm_is_awaited_and_named(arm: int) -> None:
    one = History(np.full(3, arm == 0), np.ones(3), np.arange(3.0), 9.0, 1.0)
    look = design_of(config(), ALPHA).look(one)
    assert look.verdict == "continue" and ("champion", "challenger")[arm] in look.reasons[0]


@pytest.mark.parametrize("design", ["fixed", "group_sequential", "anytime"])
def test_outcomes_that_do_not_vary_tell_nothing(design: str) -> None:
    seen = history((0.0, 0.0), 1000)
    look = design_of(config(conversations=1000, design=design), ALPHA).look(seen)
    assert look.verdict == "reject" and "nothing tells the arms apart" in look.reasons[0]
    look = design_of(config(conversations=2000, design=design), ALPHA).look(seen)
    assert look.verdict == "continue"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outcome": np.array([0.0, np.nan, 1.0])}, "conversation 1 has matured without an outcome"),
        ({"outcome": np.array([0.0, 1.0, 2.0])}, r"conversation 2 has an outcome outside \[0, 1\]"),
        ({"assigned": np.array([0.0, 2.0, 1.0])}, "conversation 2 was assigned before"),
        ({"assigned": np.array([0.0, np.nan, 1.0])}, "conversation 1 was assigned before"),
        ({"outcome": np.zeros(2)}, "2 values of outcome for 3 conversations"),
        ({"business": np.zeros(4)}, "4 values of business for 3 conversations"),
        ({"challenger": np.zeros(3)}, "expected bool"),
    ],
)
def test_a_history_that_cannot_be_is_refused(changes: dict[str, np.ndarray], message: str) -> None:
    sound = History(np.array([True, False, True]), np.zeros(3), np.arange(3.0), 9.0, 1.0)
    with pytest.raises(TurnTableError, match=message):
        replace(sound, **changes)


def test_businesses_must_be_known_and_in_one_arm() -> None:
    test = design_of(config(unit="business"), ALPHA)
    with pytest.raises(TurnTableError, match="have no business id"):
        test.look(history((0.3, 0.3), 50))
    with pytest.raises(TurnTableError, match="business 'b0' is in both arms"):
        test.look(history((0.3, 0.3), 50, business=np.array(["b0", "b1"] * 25)))


def test_few_businesses_are_not_enough() -> None:
    arm = np.tile(np.arange(8) % 2 == 0, 20)
    seen = History(arm, np.random.default_rng(0).random(160).round(), np.arange(160.0), 200.0, 1.0, np.arange(160) % 8)
    look = design_of(config(unit="business"), ALPHA).look(seen)
    assert look.verdict == "continue" and "those of 4.0 businesses" in look.reasons[0]


@pytest.mark.parametrize("design", ["fixed", "group_sequential", "anytime"])
def test_an_arm_of_few_businesses_is_not_enough_however_many_the_other_has(design: str) -> None:
    """Of four in forty, 95 % intervals by their spread held the truth in three of four simulated tests."""
    business, success = np.repeat(np.arange(40), 25), np.random.default_rng(0).random(1000) < 0.3
    one_large = np.where((business >= 20) & (business < 36), 20, business)
    for challenger, codes, worth in ((business >= 36, business, "4.0"), (business >= 20, one_large, "1.5")):
        share = float(challenger.mean())
        test = config(design=design, unit="business", conversations=1000, challenger_share=share, ramp=[])
        seen = History(challenger, success.astype(float), np.arange(1000.0), 2000.0, 1.0, codes)
        look = design_of(test, ALPHA).look(seen)
        assert (look.verdict, look.low, look.high) == ("continue", None, None), "it says nothing of the challenger"
        assert f"conversations are those of {worth} businesses of equal size, at least 10" in look.reasons[0]
        assert "beyond the plan's end if need be; where none will, end it" in look.reasons[0]
        found = inference(test, ALPHA, seen, look)
        assert (found.p_value, found.gain_low, found.gain_high) == (1.0, -1.0, 1.0), "it is no fixed sample"


@pytest.mark.parametrize("design", ["fixed", "group_sequential", "anytime"])
def test_a_test_that_waited_for_businesses_beyond_its_plan_is_decided_once_they_are_there(design: str) -> None:
    rng, business = np.random.default_rng(0), np.repeat(np.arange(60), 20)
    challenger = (business % 2 == 1) & ((business < 18) | (business >= 40))
    outcome = (rng.random(1200) < np.where(challenger, 0.8, 0.3)).astype(float)
    whole = History(challenger, outcome, np.arange(1200.0), 0.0, 0.0, business)
    settings = config(design=design, unit="business", conversations=800, ramp=[])
    settings = settings.model_copy(update={"challenger_share": float(challenger.mean())})
    test = design_of(settings, ALPHA)
    few = test.look(replace(whole, now=799.0))
    assert (few.verdict, few.fraction, few.statistic) == ("continue", 1.0, None)
    assert test.look(replace(whole, now=1199.0)).verdict == "promote"


def test_arms_of_unequal_definition_are_refused() -> None:
    arm = {"outcome": "purchase", "window_hours": 72.0}
    comparable(arm, dict(arm))
    with pytest.raises(ConfigError, match=r"differ in window_hours: 72.0 for the champion and 24.0"):
        comparable(arm, {**arm, "window_hours": 24.0})
    with pytest.raises(ConfigError, match="differ in start"):
        comparable(arm, {**arm, "start": "monday"})


def test_a_look_record_of_another_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="a look's record"):
        Look.from_dict({"verdict": "promote"})


# --- ramp ------------------------------------------------------------------------------------------------------------


def test_only_the_last_stage_of_the_ramp_is_evidence() -> None:
    ramp = Ramp.of(config(ramp=[0.01, 0.1], ramp_hours=24.0, challenger_share=0.5))
    assert [ramp.share(hours) for hours in (0, 23.9, 24, 47.9, 48, 1000)] == [0.01, 0.01, 0.1, 0.1, 0.5, 0.5]
    assert ramp.evidence(np.array([0.0, 47.9, 48.0, 90.0])).tolist() == [False, False, True, True]
    bare = Ramp((), 24.0, 0.5)
    assert bare.share(0.0) == 0.5 and bare.evidence(np.zeros(2)).all()


@pytest.mark.parametrize("ramp", [[0.1, 0.01], [0.0, 0.1], [0.1, 0.5], [0.6]])
def test_a_ramp_must_rise(ramp: list[float]) -> None:
    with pytest.raises(ConfigError, match="ramp must rise"):
        config(ramp=ramp)


# --- planner ---------------------------------------------------------------------------------------------------------


def test_the_fixed_sample_is_the_textbook_formula() -> None:
    """Fleiss: (z_a sqrt(2 p q) + z_b sqrt(p1 q1 + p2 q2))^2 / d^2 an arm."""
    p, q = 0.325, 0.675
    root = stats.norm.isf(0.05) * math.sqrt(2 * p * q) + stats.norm.isf(0.2) * math.sqrt(0.3 * 0.7 + 0.35 * 0.65)
    assert fixed_sample(0.3, 0.05, 0.05, 0.8, 0.5) == pytest.approx(2 * (root / 0.05) ** 2, rel=1e-6)


def test_sequential_designs_cost_more_at_most_and_less_on_average() -> None:
    fixed, group, anytime = plan(config(mde=0.05), ALPHA, 0.3, conversations_per_day=200, window_hours=72)
    assert fixed.most < group.most < 1.1 * fixed.most < anytime.most < 2.2 * fixed.most
    assert group.expected_if_better < 0.85 * fixed.most and anytime.expected_if_better < fixed.most
    assert fixed.most_days == pytest.approx(2 + 3 + fixed.most / 200, abs=0.06)
    assert group_sequential_stops(1, ALPHA, 0.8).most == pytest.approx(1.0, abs=1e-6)


def test_businesses_need_the_design_effect_more() -> None:
    alone = plan(config(mde=0.05), ALPHA, 0.3)
    together = plan(config(mde=0.05, unit="business", business_conversations=20, business_icc=0.05), ALPHA, 0.3)
    for one, other in zip(alone[:2], together[:2], strict=True):
        assert 1.95 * (one.most - 1) <= other.most <= 1.95 * one.most + 20 and one.most_days is None
        assert other.most % 20 == 0, "whole businesses"


@pytest.mark.parametrize("share", [0.5, 0.2])
def test_a_plan_has_the_businesses_that_a_look_asks_for(share: float) -> None:
    few = plan(config(mde=0.3, unit="business", business_conversations=20, challenger_share=share), ALPHA, 0.3)
    sizes = {size for one in few for size in (one.most, one.expected_if_equal)}
    assert len(sizes) == 1, "a look asks for more of them than the effect does"
    count = sizes.pop() / 20
    challengers = np.random.default_rng(0).binomial(round(count), share, 20_000)
    assert np.mean(np.minimum(challengers, count - challengers) >= 10) == pytest.approx(0.95, abs=0.02)


@pytest.mark.parametrize(("base", "mde", "size", "icc"), [(0.2, 0.05, 50, 0.02), (0.3, 0.15, 100, 0.05)])
def test_bets_on_businesses_have_the_planned_power(base: float, mde: float, size: int, icc: float) -> None:
    """Their means hardly differ, and no bet may be as high as that would call for."""
    settings = config(mde=mde, unit="business", business_conversations=size, business_icc=icc)
    anytime = plan(settings, ALPHA, base)[2]
    assert anytime.expected_if_better < anytime.most
    world = many.businesses(base, mde, math.ceil(anytime.most / size), size, icc)
    [power] = many.share_promoted(world, [many.anytime(mde, ALPHA, size, futility=True)], 400, [4])
    assert abs(power - 0.8) < 0.02 + 3 * math.sqrt(0.16 / 400)


@pytest.mark.parametrize(
    ("base", "daily", "message"),
    [
        (0.97, None, "their sum below 1"),
        (0.0, None, "above 0"),
        (0.3, 0.0, "conversations a day"),
        (0.3, math.nan, "conversations a day"),
        (0.3, math.inf, "conversations a day"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(base: float, daily: float | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(config(mde=0.05), ALPHA, base, daily)


def test_an_mde_of_half_the_rate_is_named_with_one_to_set() -> None:
    told = coarse(0.05, 0.02)
    assert told is not None and "abtest.mde 5.0% beside a champion's success rate of 2.0%" in told
    assert "3.5 times as many successes may be missed; set abtest.mde to about 0.005" in told
    assert coarse(0.05, 0.1) is not None and "about 0.03" in str(coarse(0.05, 0.1))
    assert coarse(0.05, 0.11) is None and coarse(0.05, None) is None and coarse(0.05, 0.0) is None


def test_a_test_too_small_for_its_guardrails_is_named_with_a_size() -> None:
    gate = load_config().gate
    told = too_few(gate, config(conversations=400))
    assert told is not None and "set abtest.conversations to " in told
    size = int(told.split("set abtest.conversations to ")[1].split()[0])
    assert told.startswith(f"guardrail pii needs {size:,} conversations") and 700 < size < 900
    assert too_few(gate, config(conversations=size - 1)) and not too_few(gate, config(conversations=size))
    assert not too_few(gate, config(conversations=600, design="fixed")), "guardrails are asked once"
    assert too_few(gate, config(conversations=2 * size, challenger_share=0.2)), "the smaller arm counts"
    assert too_few(gate, config(conversations=size, unit="business")), "of businesses, more"


@pytest.mark.parametrize(("alpha", "power"), [(0.5, 0.5), (0.6, 0.5), (0.05, 0.05), (0.3, 0.99)])
def test_a_power_that_no_size_has_is_refused(alpha: float, power: float) -> None:
    with pytest.raises(ConfigError, match=f"no size for alpha {alpha:g} and power {power:g}; expected an alpha such"):
        plan(config(mde=0.05, power=power), alpha, 0.3)


# --- error rates, a smaller version of `make bench-gate` -------------------------------------------------------------


def designs() -> list[many.Promotions]:
    return [many.sequential([1.0], ALPHA), many.sequential(FIVE, ALPHA), many.anytime(0.05, ALPHA, 20)]


@pytest.mark.parametrize(
    "world",
    [
        many.textbook(0.02, 0.0, 1500),
        many.textbook(0.3, 0.0, 1500),
        many.textbook(many.drifting(0.3, 1500, 14), 0.0, 1500),
        many.textbook(many.drifting(0.3, 1500, 14), 0.0, 1500, share=0.2),
        many.businesses(0.1, 0.0, 75, 20, 0.05),
        many.late(0.3, 1500, 300),
    ],
    ids=["rare", "textbook", "drifting", "drifting, unequal arms", "businesses", "late outcomes"],
)
def test_no_design_promotes_more_often_than_alpha_under_a_null(world: many.World) -> None:
    shares = many.share_promoted(world, designs(), 2000, [0])
    assert max(shares) <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / 2000), shares


def test_the_usual_mistakes_do() -> None:
    naive = many.sequential([look / 40 for look in range(1, 41)], ALPHA, [stats.norm.isf(ALPHA)] * 40)
    assert many.share_promoted(many.textbook(0.3, 0.0, 1500), [naive], 1000, [1])[0] > 0.2
    closing = many.as_they_close(FIVE, ALPHA)
    assert many.share_promoted(many.late(0.3, 1500, 300), [closing], 1000, [1])[0] > 0.2


def test_a_planned_size_has_its_power() -> None:
    fixed, group, anytime = plan(config(mde=0.08), ALPHA, 0.3)
    shipped = [
        (fixed, many.sequential([1.0], ALPHA)),
        (group, many.sequential(FIVE, ALPHA, mde=0.08)),
        (anytime, many.anytime(0.08, ALPHA, futility=True)),
    ]
    for planned, design in shipped:
        [power] = many.share_promoted(many.textbook(0.3, 0.08, planned.most), [design], 2000, [2])
        assert abs(power - 0.8) < 0.02 + 3 * math.sqrt(0.16 / 2000)
