"""Statistics against hand-made and published numbers, error rates under simulated nulls, and gates that say why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from ab_arms import abtest, decided, history
from gate_evidence import ACCEPTANCE, BROKEN, CERTIFICATE, ESTIMATE, GOOD, HELD
from scipy.stats import chi2_contingency, norm, t, ttest_1samp

from iterative_ppo.errors import ConfigError
from iterative_ppo.evaluation.ab_test import Arm, ab_test, assign
from iterative_ppo.evaluation.evidence import paired_gain
from iterative_ppo.evaluation.fixed_sample import FixedSample
from iterative_ppo.evaluation.gate import offline_gate, outcome_gate
from iterative_ppo.evaluation.guardrails import LIMIT
from iterative_ppo.evaluation.metrics import (
    Method,
    auc,
    calibration,
    calibrator,
    proportion_interval,
    r_squared,
    recalibrated,
    recalibration,
    within_state_ranking,
)
from iterative_ppo.evaluation.non_inferiority import proportion

# --- A/B test --------------------------------------------------------------------------------------------------------


def score_z(champion: Arm, challenger: Arm) -> float:
    """The score statistic of two proportions, pooled under the null, by hand (Miettinen & Nurminen's n / (n - 1))."""
    x, n, y, m = challenger.successes, challenger.conversations, champion.successes, champion.conversations
    pooled = (x + y) / (n + m)
    variance = pooled * (1 - pooled) * (1 / n + 1 / m) * (n + m) / (n + m - 1)
    return (x / n - y / m) / math.sqrt(variance)


@pytest.mark.parametrize(
    ("champion", "challenger"),
    [
        (Arm(200, 1000), Arm(250, 1000)),
        (Arm(30, 150), Arm(20, 140)),
        (Arm(1, 50), Arm(4, 60)),
        (Arm(0, 40), Arm(5, 40)),
    ],
)
def test_the_p_value_is_that_of_the_score_test(champion: Arm, challenger: Arm) -> None:
    test = ab_test(champion, challenger, 0.05)
    assert test.p_value == pytest.approx(norm.sf(score_z(champion, challenger)), rel=1e-6)
    assert test.gain == pytest.approx(challenger.rate - champion.rate)
    assert test.gain_low < test.gain < test.gain_high


def test_the_p_value_is_half_of_a_chi_squares() -> None:
    """200 of 1000 against 250 of 1000: chi-square without correction, one-sided, up to the factor (n - 1) / n."""
    statistic = chi2_contingency([[250, 750], [200, 800]], correction=False)[0]
    p_value = ab_test(Arm(200, 1000), Arm(250, 1000), 0.05).p_value
    assert norm.isf(p_value) ** 2 == pytest.approx(statistic * 1999 / 2000, rel=1e-6)
    assert p_value == pytest.approx(0.003717, abs=1e-6)


def test_the_interval_is_newcombes() -> None:
    """Newcombe (1998), Stat. Med. 17: 873-890, Table II: 56/70 - 48/80, method 10: 0.0524 to 0.3339."""
    test = ab_test(champion=Arm(48, 80), challenger=Arm(56, 70), alpha=0.05)
    assert (test.gain, test.gain_low, test.gain_high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)
    nothing = ab_test(champion=Arm(0, 20), challenger=Arm(0, 10), alpha=0.05)
    assert (nothing.gain_low, nothing.gain_high) == pytest.approx((-0.1611, 0.2775), abs=5e-5)


def test_swapping_the_arms_turns_the_test_round() -> None:
    one, other = Arm(40, 200), Arm(60, 210)
    there, back = ab_test(one, other, 0.05), ab_test(other, one, 0.05)
    assert there.p_value + back.p_value == pytest.approx(1.0)
    assert (back.gain, back.gain_low, back.gain_high) == pytest.approx((-there.gain, -there.gain_high, -there.gain_low))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("champion", "challenger"), [(0, 5), (5, 20)])
def test_one_arm_that_all_failed_or_all_succeeded_is_compared_without_a_warning(champion: int, challenger: int) -> None:
    assert 0.0 < ab_test(Arm(champion, 20), Arm(challenger, 20), 0.05).p_value < 0.05


@pytest.mark.parametrize("successes", [0, 50])
def test_arms_that_all_failed_or_all_succeeded_tell_nothing(successes: int) -> None:
    test = ab_test(Arm(successes, 50), Arm(successes, 50), 0.05)
    assert test.p_value == 1.0 and test.gain == 0.0
    assert test.gain_low < 0 < test.gain_high and math.isfinite(test.gain_high - test.gain_low)


@pytest.mark.parametrize(("champion", "challenger"), [(Arm(0, 0), Arm(1, 2)), (Arm(1, 2), Arm(0, 0))])
def test_an_empty_arm_is_an_error_that_names_it(champion: Arm, challenger: Arm) -> None:
    name = "champion" if champion.conversations == 0 else "challenger"
    with pytest.raises(ConfigError, match=f"{name} arm holds no matured conversation"):
        ab_test(champion, challenger, 0.05)
    assert math.isnan(Arm(0, 0).rate)


def test_a_test_is_json() -> None:
    values = json.loads(json.dumps(ab_test(Arm(1, 10), Arm(2, 10), 0.05).as_dict()))
    assert values["champion"] == {"successes": 1, "conversations": 10} and values["alpha"] == 0.05


def rejections(base: float, lift: float, size: int, experiments: int, alpha: float) -> float:
    rng = np.random.default_rng(0)
    champion, challenger = rng.binomial(size, base, experiments), rng.binomial(size, base + lift, experiments)
    known: dict[tuple[int, int], bool] = {}
    for pair in zip(champion.tolist(), challenger.tolist(), strict=True):
        if pair not in known:
            known[pair] = ab_test(Arm(pair[0], size), Arm(pair[1], size), alpha).p_value < alpha
    return float(np.mean([known[pair] for pair in zip(champion.tolist(), challenger.tolist(), strict=True)]))


def test_a_policy_no_better_is_promoted_no_more_often_than_alpha() -> None:
    """2,000 simulated nulls at base rate .2: at most alpha and 3 standard errors."""
    alpha = 0.05
    rate = rejections(0.2, 0.0, 300, 2000, alpha)
    assert 0.02 < rate <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 2000)


def test_a_policy_ten_points_better_is_found_at_the_planned_size() -> None:
    assert rejections(0.2, 0.1, 1500, 100, 0.05) == 1.0
    assert rejections(0.2, -0.1, 1500, 100, 0.05) == 0.0, "one-sided"


# --- assignment ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9])
def test_a_share_of_units_meets_the_challenger(share: float) -> None:
    arms = [assign(f"customer-{k}", "salt", share) for k in range(20_000)]
    assert set(arms) == {"champion", "challenger"}
    error = math.sqrt(share * (1 - share) / len(arms))
    assert abs(arms.count("challenger") / len(arms) - share) < 3 * error


def test_an_arm_is_sticky_and_a_new_salt_draws_anew() -> None:
    units = [f"customer-{k}" for k in range(2000)]
    one, again, other = ([assign(unit, salt, 0.5) for unit in units] for salt in ("a", "a", "b"))
    assert one == again
    assert abs(np.mean([a == b for a, b in zip(one, other, strict=True)]) - 0.5) < 0.04


def test_raising_the_share_takes_nobody_out_of_the_challengers_arm() -> None:
    units = [f"customer-{k}" for k in range(2000)]
    early, late = ({unit for unit in units if assign(unit, "a", share) == "challenger"} for share in (0.1, 0.5))
    assert early < late


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_r_squared_longhand() -> None:
    truth = np.array([0.0, 1.0, 1.0, 0.0])
    assert r_squared(truth, truth) == 1.0
    assert r_squared(truth, np.full(4, 0.5)) == 0.0
    assert r_squared(truth, np.array([0.0, 0.5, 1.0, 0.0])) == pytest.approx(1 - 0.25 / 1.0)
    assert r_squared(truth, 1 - truth) == pytest.approx(1 - 4 / 1.0)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3])
def test_r_squared_of_a_truth_that_does_not_vary_is_nan(value: float) -> None:
    assert math.isnan(r_squared(np.full(7, value), np.linspace(0, 1, 7)))


def test_auc_is_the_chance_that_a_positive_scores_higher() -> None:
    rng = np.random.default_rng(0)
    positive, score = rng.random(60) < 0.4, rng.integers(0, 8, 60).astype(float)
    pairs = score[positive][:, None] - score[~positive][None, :]
    assert auc(positive, score) == pytest.approx(float(((pairs > 0) + 0.5 * (pairs == 0)).mean()))


@pytest.mark.parametrize("positive", [np.ones(4, bool), np.zeros(4, bool)])
def test_auc_of_one_class_is_nan(positive: np.ndarray) -> None:
    assert math.isnan(auc(positive, np.arange(4.0)))


def test_wilsons_interval() -> None:
    """Newcombe (1998), Stat. Med. 17: 857-872, Table I, method 3: 81/263 and 0/20."""
    assert proportion_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert proportion_interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    narrow, wide = proportion_interval(81, 263, 0.5), proportion_interval(81, 263, 0.99)
    assert wide[0] < narrow[0] < 81 / 263 < narrow[1] < wide[1]


def test_ranking_within_a_state_does_not_care_which_state_is_better() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random((50, 4))
    levels = 10 * rng.random((50, 1))
    assert within_state_ranking(truth, truth + levels) == pytest.approx(1.0)
    assert within_state_ranking(truth, levels - 3 * truth) == pytest.approx(-1.0)
    between = truth.mean(axis=1, keepdims=True) + np.zeros_like(truth) + 1e-3 * rng.standard_normal(truth.shape)
    assert abs(within_state_ranking(truth, between)) < 0.2, "to know the states is not to rank the actions"


def test_ranking_within_a_state_longhand() -> None:
    truth, predicted = np.array([[1.0, 0.0, 0.5], [0.2, 0.2, 0.2]]), np.array([[0.6, 0.0, 0.0], [5.0, 6.0, 7.0]])
    a, b = np.array([0.5, -0.5, 0.0, 0.0, 0.0, 0.0]), np.array([0.4, -0.2, -0.2, -1.0, 0.0, 1.0])
    assert within_state_ranking(truth, predicted) == pytest.approx(float(np.corrcoef(a, b)[0, 1]))


@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3])
def test_ranking_where_no_action_differs_is_nan(value: float) -> None:
    assert math.isnan(within_state_ranking(np.full((5, 3), value), np.random.default_rng(0).random((5, 3))))


# --- calibration -----------------------------------------------------------------------------------------------------


def turns_of(conversations: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, observed, group) of turns whose conversation succeeds with just the predicted probability."""
    chance = np.repeat(rng.beta(1.0, 3.0, conversations), 4)
    predicted = np.clip(chance + 0.0 * chance, 0, 1)
    group = np.repeat(np.arange(conversations), 4)
    return predicted, (rng.random(conversations)[group] < predicted).astype(float), group


def test_a_perfect_predictor_rarely_exceeds_what_chance_gives() -> None:
    rng = np.random.default_rng(0)
    exceeded = []
    for seed in range(120):
        found = calibration(*turns_of(120, rng), draws=100, seed=seed)
        exceeded.append(found.error > found.chance_95)
    assert np.mean(exceeded) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 120)
    assert any(exceeded), "the bound is not so wide that nothing could exceed it"


def test_a_biased_predictor_exceeds_it() -> None:
    predicted, observed, group = turns_of(400, np.random.default_rng(1))
    for biased in (np.clip(predicted + 0.15, 0, 1), predicted**3):
        found = calibration(biased, observed, group)
        assert found.error > found.chance_95
    good = calibration(predicted, observed, group)
    assert good.error < good.chance_95


@pytest.mark.parametrize("method", ["isotonic", "temperature"])
def test_of_a_mapped_predictor_chance_knows_that_the_map_was_fitted(method: Method) -> None:
    """A perfect one, of few conversations: held against chance that knows of no fit, isotonic fails half the time."""
    exceeded, without = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        predicted, group = rng.beta(2.0, 4.0, 60), np.arange(60)
        observed = (rng.random(60) < predicted).astype(float)
        found = recalibration(predicted, observed, group, method, draws=60)
        mapped = recalibrated(predicted, observed, group, method)
        assert found.error == calibration(mapped, observed, group, draws=1).error
        exceeded.append(found.error > found.chance_95)
        without.append(found.error > calibration(mapped, observed, group, draws=60).chance_95)
    assert np.mean(exceeded) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 20)
    assert method == "temperature" or np.mean(without) > 0.25


def test_no_calibration_turns_a_wrong_predictor_round() -> None:
    predicted = np.random.default_rng(0).random(400)
    observed = (np.random.default_rng(1).random(400) > predicted).astype(float)
    methods: tuple[Method, ...] = ("isotonic", "temperature")
    for method in methods:
        found = calibrator(predicted, observed, method)(np.array([0.1, 0.5, 0.9]))
        assert (np.diff(found) >= 0).all() and np.ptp(found) < 0.1


def test_the_temperature_of_logits_that_are_too_sure_is_found() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(20_000)
    observed, sure = (rng.random(20_000) < truth).astype(float), 1 / (1 + ((1 - truth) / truth) ** 3)
    mapped = calibrator(sure, observed, "temperature")(sure)
    assert np.abs(mapped - truth).max() < 0.02


def between(conversations: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of outcomes between 0 and 1, which are within a few hundredths of what is predicted."""
    expected, group = rng.uniform(0.2, 0.8, conversations), np.repeat(np.arange(conversations), 4)
    return expected[group], (expected + rng.normal(0.0, 0.03, conversations))[group], group


def discounted(conversations: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same of returns, worth less the longer there is to go."""
    predicted, observed, group = turns_of(conversations, rng)
    worth = np.tile([0.73, 0.81, 0.9, 1.0], conversations)
    return worth * predicted, worth * observed, group


@pytest.mark.parametrize("sample", [between, discounted])
def test_outcomes_of_any_kind_have_a_bound_that_fits_them(sample: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    exceeded = []
    for seed in range(200):
        found = calibration(*sample(100, rng), draws=100, seed=seed)
        exceeded.append(found.error > found.chance_95)
    assert 0.01 < np.mean(exceeded) < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)


def test_a_small_bias_is_seen_where_outcomes_vary_little() -> None:
    for seed in range(10):
        predicted, observed, group = between(300, np.random.default_rng(seed))
        found = calibration(predicted + 0.04, observed, group)
        assert found.error > 2 * found.chance_95


def test_turns_of_one_conversation_succeed_together_under_the_null() -> None:
    """Four turns a conversation are no four observations: the bound is wider than for turns on their own."""
    predicted, observed, group = turns_of(150, np.random.default_rng(2))
    together = calibration(predicted, observed, group).chance_95
    alone = calibration(predicted, observed, np.arange(len(group))).chance_95
    assert together > 1.3 * alone


def test_bins_have_equal_mass_and_add_up() -> None:
    predicted, observed, group = turns_of(100, np.random.default_rng(3))
    found = calibration(predicted, observed, group)
    assert sum(found.count) == len(predicted) and max(found.count) - min(found.count) <= 5
    assert found.predicted == sorted(found.predicted)
    weights = np.array(found.count) / len(predicted)
    assert np.dot(weights, found.observed) == pytest.approx(observed.mean())
    gaps = np.abs(np.array(found.observed) - np.array(found.predicted))
    assert found.error == pytest.approx(float(np.dot(weights, gaps)))


def test_one_prediction_for_all_is_one_bin() -> None:
    found = calibration(np.full(50, 0.3), np.append(np.ones(20), np.zeros(30)), np.arange(50))
    assert found.count == [50] and found.error == pytest.approx(0.1)


# --- evidence --------------------------------------------------------------------------------------------------------


def test_the_paired_gain_covers_the_truth_where_states_share_conversations() -> None:
    """400 experiments of 60 conversations with 1 to 8 states each, most of the variance between conversations."""
    rng = np.random.default_rng(0)
    covered, naive = [], []
    for _ in range(400):
        size = rng.integers(1, 9, 60)
        group = np.repeat(np.arange(60), size)
        gain = 0.1 + 0.5 * rng.standard_normal(60)[group] + 0.2 * rng.standard_normal(len(group))
        before = rng.random(len(group))
        low, high = paired_gain(before, before + gain, group)
        covered.append(low < 0.1 < high)
        low, high = paired_gain(before, before + gain, np.arange(len(group)))
        naive.append(low < 0.1 < high)
    assert abs(np.mean(covered) - 0.95) < 0.02 + 3 * math.sqrt(0.95 * 0.05 / 400)
    assert np.mean(naive) < 0.85, "states as if each stood alone would promise too much"


def test_the_paired_gain_of_few_conversations_is_a_t_interval_and_one_tells_nothing() -> None:
    rng = np.random.default_rng(1)
    gains = rng.standard_normal((4000, 3))
    found = np.array([paired_gain(np.zeros(3), gain, np.arange(3)) for gain in gains])
    plain = [ttest_1samp(gain, 0.0).confidence_interval() for gain in gains[:5]]
    assert found[:5] == pytest.approx(np.array(plain))
    covered = (found[:, 0] < 0) & (found[:, 1] > 0)
    assert abs(covered.mean() - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 4000)
    assert paired_gain(np.zeros(4), np.full(4, 0.3), np.array(["a"] * 4)) == (-math.inf, math.inf)


def test_the_paired_gain_is_centred_and_any_labels_serve() -> None:
    before, after = np.array([0.1, 0.2, 0.3, 0.4]), np.array([0.3, 0.3, 0.3, 0.5])
    low, high = paired_gain(before, after, np.array(["a", "a", "b", "c"]))
    assert (low + high) / 2 == pytest.approx(0.1)
    assert paired_gain(before, after, np.array(["z", "z", "y", "x"])) == pytest.approx((low, high))
    spread = math.sqrt((0.1**2 + 0.1**2 + 0.0**2) * 3 / 2) / 4
    assert high - low == pytest.approx(2 * t.ppf(0.975, 2) * spread)
    assert paired_gain(before, before + 0.25, np.arange(4)) == pytest.approx((0.25, 0.25))


# --- gates -----------------------------------------------------------------------------------------------------------


def kinds(reasons: Sequence[str]) -> list[str]:
    return [reason.split(":")[0] for reason in reasons]


def test_good_evidence_lets_the_challenger_meet_customers() -> None:
    decision = offline_gate(GOOD)
    assert decision.verdict == "test" and kinds(decision.reasons) == ["passed"] * 4
    assert json.loads(json.dumps(decision.as_dict())) == {"verdict": "test", "reasons": list(decision.reasons)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"q_gain_low": -0.001}, "E[Q] on held-out states moved by +0.0500 (-0.0010 to +0.0800)"),
        ({"q_gain_low": 0.0}, "E[Q]"),
        ({"q_gain_low": math.nan}, "nan"),
        (
            {"certificate": replace(CERTIFICATE, gain=-0.03, low=-0.05, high=-0.01)},
            "certificate: single-turn gain -0.03",
        ),
        (
            {"estimates": {"doubly_robust_gain": replace(ESTIMATE, value=-0.03, low=-0.05, high=-0.01)}},
            "off-policy gain of whole conversations: -0.0300",
        ),
        ({"guardrails": (BROKEN,)}, "guardrail acceptance 0.7, champion 0.8"),
    ],
)
def test_each_failing_measure_rejects_and_is_told_first(changes: dict[str, Any], words: str) -> None:
    decision = offline_gate(replace(GOOD, **changes))
    assert decision.verdict == "reject" and kinds(decision.reasons) == ["failed"] + ["passed"] * 3
    assert words in decision.reasons[0]


def test_a_guardrail_that_is_not_told_rejects_and_says_by_how_much_it_was_seen() -> None:
    few = proportion(ACCEPTANCE, Arm(6, 9), Arm(5, 8))
    limit = replace(few, measure=f"repetition{LIMIT}", champion=0.5, challenger=0.0, loss=math.nan, p_value=1.0)
    offline = offline_gate(replace(GOOD, guardrails=(HELD, BROKEN, few)))
    assert offline.verdict == "reject" and kinds(offline.reasons) == ["failed", "not told"] + ["passed"] * 4
    assert offline.reasons[1].endswith("; 200 held-out states do not tell")
    look = FixedSample(abtest(conversations=17), 0.05).look(history(Arm(1, 9), Arm(8, 8)))
    decision = outcome_gate(look, (few, limit))
    assert decision.verdict == "reject" and kinds(decision.reasons) == ["not told"] * 2 + ["passed"]
    seen = "8 conversations of the challenger and 9 of the champion do not tell"
    assert decision.reasons[0].startswith("not told: guardrail acceptance 0.625, champion 0.6667: at most")
    assert decision.reasons[1] == f"not told: guardrail repetition 0 (limit 0.5); {seen}"


@pytest.mark.parametrize(
    "changes",
    [
        {"certificate": replace(CERTIFICATE, low=-0.01)},
        {"certificate": replace(CERTIFICATE, low=-9.0, high=-8.0, refusal="the logs hold no log-probs")},
        {"estimates": {"doubly_robust_gain": replace(ESTIMATE, low=-9.0, high=-8.0, refusal="too few")}},
        {"certificate": replace(CERTIFICATE, gain=math.nan, low=math.nan, high=math.nan)},
    ],
)
def test_logs_that_cannot_tell_are_said_and_left_to_the_ab_test(changes: dict[str, Any]) -> None:
    decision = offline_gate(replace(GOOD, **changes))
    assert decision.verdict == "test"
    assert kinds(decision.reasons) == ["cannot tell from these logs"] + ["passed"] * 3


def test_all_failures_come_before_what_passed() -> None:
    untold = replace(CERTIFICATE, refusal="too few turns")
    decision = offline_gate(replace(GOOD, q_gain_low=-1.0, guardrails=(HELD, BROKEN), certificate=untold))
    assert kinds(decision.reasons) == ["failed"] * 2 + ["cannot tell from these logs"] + ["passed"] * 2


def test_evidence_is_json_with_null_for_what_is_no_number() -> None:
    values = json.loads(json.dumps(replace(GOOD, q_r2=math.nan).as_dict(), allow_nan=False))
    assert values == json.loads(json.dumps(asdict(GOOD) | {"q_r2": None}))


def test_before_its_planned_size_a_test_goes_on_whatever_it_shows() -> None:
    decision = decided(Arm(0, 400), Arm(400, 500), planned=1000)
    assert decision.verdict == "continue" and decision.reasons == ("900 of 1000 planned conversations have matured",)


def test_a_better_challenger_is_promoted_and_another_is_not() -> None:
    better, alike, worse = (decided(Arm(100, 500), Arm(k, 500)) for k in (150, 105, 60))
    assert (better.verdict, alike.verdict, worse.verdict) == ("promote", "reject", "reject")
    assert better.reasons[0].startswith("passed: challenger 30.0% of 500, champion 20.0% of 500: +10.0% (")
    assert worse.reasons[0].startswith("failed: challenger 12.0% of 500") and "bound 1.645" in worse.reasons[0]


def test_arms_without_a_success_reject() -> None:
    assert decided(Arm(0, 500), Arm(0, 500)).verdict == "reject"


def test_a_stricter_level_asks_for_more() -> None:
    champion, challenger = Arm(100, 500), Arm(122, 500)
    p_value = ab_test(champion, challenger, 0.05).p_value
    assert 0.01 < p_value < 0.05 + 0.01
    verdicts = [decided(champion, challenger, alpha).verdict for alpha in (p_value * 1.01, p_value * 0.99)]
    assert verdicts == ["promote", "reject"]
