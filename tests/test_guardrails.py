"""Guardrails: what each measures, tests that hold their level, personal data, a user's own, and reward hackers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from random import Random
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gate_evidence import GOOD
from scipy.stats import t, ttest_ind, ttest_rel

from benchmarks import hackers
from benchmarks.hackers import HACKS, flattered, passes, said, usual
from iterative_ppo.config import GuardrailConfig, load_config
from iterative_ppo.environments.renovation import Renovation, Script
from iterative_ppo.environments.rollout import collect
from iterative_ppo.errors import ConfigError
from iterative_ppo.evaluation import pii
from iterative_ppo.evaluation.degeneration import compression, repeated_ngrams, words
from iterative_ppo.evaluation.gate import offline_gate, outcome_gate
from iterative_ppo.evaluation.guardrails import (
    MEASURES,
    Said,
    Sample,
    calibrated,
    clustered_mean,
    guarded,
    least_conversations,
    measure_of,
)
from iterative_ppo.evaluation.metrics import Calibration, calibration
from iterative_ppo.evaluation.non_inferiority import Guardrail, NonInferiority
from iterative_ppo.mdp.conversation import Conversation, Suggestion, Turn
from iterative_ppo.mdp.turn_table import to_frame

GATE = load_config().gate
LOWER = Guardrail("measure", "lower", 0.1, 0.05)


def rule(function: str, margin: float = 0.1, direction: Any = "lower", limit: float | None = None) -> GuardrailConfig:
    return GuardrailConfig(function=function, direction=direction, margin=margin, limit=limit)


def texts(*spoken: str, units: int = 20) -> Said:
    """The same responses in each of some conversations."""
    repeated = [text for _ in range(units) for text in spoken]
    abstained = np.array([not text for text in repeated])
    unit = np.repeat(np.arange(units), len(spoken))
    return Said(unit, repeated, [text.split() for text in repeated], abstained)


def found(champion: Said, challenger: Said, **rules: GuardrailConfig) -> dict[str, NonInferiority]:
    return {one.measure: one for one in guarded(rules, champion, challenger, 0.05)}


# --- degeneration ----------------------------------------------------------------------------------------------------


def test_repeated_ngrams_are_those_that_stood_there_before() -> None:
    assert repeated_ngrams([1, 2, 3, 4]) == 0.0
    assert repeated_ngrams([1, 2, 1, 2, 1]) == pytest.approx(0.5)
    assert repeated_ngrams([7, 7, 7, 7, 7]) == pytest.approx(0.75)
    assert repeated_ngrams("abcabcabc", 3) == pytest.approx(1 - 3 / 7)
    assert repeated_ngrams([1]) == repeated_ngrams([]) == 0.0


def test_loops_compress_and_sentences_do_not() -> None:
    assert compression("We can do your kitchen with our basic package.") < 1.1
    assert compression("deal " * 20) > 5
    assert compression("deal1 deal2 deal3 deal4 deal5 deal6 deal7 deal8 deal9") > 1.3
    assert compression("!" * 60) > 4
    assert math.isnan(compression(""))
    assert compression("你好，" * 30) > 5, "bytes, not letters"


def test_words_are_what_spaces_part_and_letters_where_a_script_has_none() -> None:
    assert words("Very well: 3 rooms,\nin May.") == ["Very", "well:", "3", "rooms,", "in", "May."]
    assert words("您好，Anna Li！") == ["您", "好", "，Anna", "Li！"]
    assert words("ขอบคุณ") == list("ขอบคุณ")
    assert words(" ") == []


def test_a_loop_is_seen_in_an_arm_whose_language_has_no_spaces() -> None:
    plain, loop = "您好，感谢您联系我们，今天会回复您。", "可以优惠" * 8
    talks = [
        Conversation(f"c{k}", (Turn("在吗", (0.0,), Suggestion(text, "suggested"), text), Turn(None, (0.0,))), f"u{k}")
        for k, text in enumerate((plain, loop))
    ]
    arm = Said.of_turns(to_frame(talks, {"sold": 1.0}, 0.2))
    repeated = MEASURES["repetition"].values(arm)
    assert repeated is not None and dict(zip(arm.texts, repeated > 0.5, strict=True)) == {plain: False, loop: True}


# --- the tests behind them -------------------------------------------------------------------------------------------


def test_paired_units_give_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    level, unit = rng.standard_normal(40), np.arange(40)
    before, after = level + 0.1 * rng.standard_normal(40), level + 0.1 * rng.standard_normal(40) + 0.05
    result = clustered_mean(LOWER, Sample(before, unit), Sample(after, unit))
    paired = ttest_rel(after - LOWER.margin, before, alternative="less")
    assert result.p_value == pytest.approx(paired.pvalue)
    assert result.loss == pytest.approx((after - before).mean())
    assert result.loss_bound == pytest.approx(paired.confidence_interval(0.95).high + LOWER.margin)
    alone = clustered_mean(LOWER, Sample(before, unit), Sample(after, unit + 100))
    assert alone.loss_bound - alone.loss > 4 * (result.loss_bound - result.loss), "unpaired, the states' levels count"


def test_units_of_one_arm_each_give_about_welchs_t_test() -> None:
    rng = np.random.default_rng(1)
    before, after = rng.standard_normal(400), 0.3 * rng.standard_normal(300)
    result = clustered_mean(LOWER, Sample(before, np.arange(400)), Sample(after, np.arange(1000, 1300)))
    welch = ttest_ind(after - LOWER.margin, before, equal_var=False, alternative="less")
    assert result.p_value == pytest.approx(welch.pvalue, rel=0.05)


def test_responses_of_one_unit_are_no_independent_observations() -> None:
    rng = np.random.default_rng(2)
    unit = np.repeat(np.arange(50), 20)
    before, after = (rng.standard_normal(50)[unit] for _ in range(2))
    together = clustered_mean(LOWER, Sample(before, unit), Sample(after, unit + 50))
    alone = clustered_mean(LOWER, Sample(before, np.arange(1000)), Sample(after, np.arange(1000, 2000)))
    assert together.loss_bound - together.loss > 4 * (alone.loss_bound - alone.loss)


def test_a_challenger_at_the_margin_passes_no_more_often_than_alpha() -> None:
    """600 experiments of 60 conversations of 1 to 6 responses, paired; and one that is no worse mostly does."""
    rng, held, half = np.random.default_rng(3), np.zeros(2), Guardrail("x", "lower", 0.5, 0.05)
    for _ in range(600):
        unit = np.repeat(np.arange(60), rng.integers(1, 7, 60))
        level = rng.standard_normal(60)[unit]
        before = level + rng.standard_normal(len(unit))
        for k, worse in enumerate((0.5, 0.0)):
            after = level + rng.standard_normal(len(unit)) + worse
            held[k] += clustered_mean(half, Sample(before, unit), Sample(after, unit)).holds
    assert held[0] / 600 < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 600)
    assert held[1] / 600 > 0.9


RARE = Guardrail("pii", "lower", 0.01, 0.05)


def spoken(count: int, share: float = 0.0, rng: np.random.Generator | None = None, first: int = 0) -> Sample:
    """Four responses in each of some conversations, of which a share say it in all four."""
    says = (rng or np.random.default_rng(0)).random(count) < share
    return Sample(np.repeat(says, 4).astype(float), np.repeat(np.arange(first, first + count), 4))


@pytest.mark.parametrize(
    ("conversations", "told"), [(12, "not told"), (225, "not told"), (300, "holds"), (1500, "holds")]
)
def test_events_that_none_of_a_few_conversations_hold_may_yet_be_there(conversations: int, told: str) -> None:
    found = clustered_mean(RARE, spoken(conversations), spoken(conversations, first=5000))
    assert (found.found, found.missed) == (told, told == "not told")
    assert 2.7 / conversations < found.loss_bound < 4.1 / conversations, "about the rule of three"
    assert (found.loss_bound < RARE.margin) == found.holds and NonInferiority.from_dict(found.as_dict()) == found
    within = clustered_mean(
        RARE, Sample(np.full(1200, 0.4), np.arange(1200)), Sample(np.full(1200, 0.4), np.arange(1200))
    )
    assert within.holds and within.loss_bound == pytest.approx(0.0), "of other values the spread is what it is"


@pytest.mark.parametrize(
    ("champions", "challengers", "alpha"), [(300, 300, 0.025), (600, 600, 0.05), (1200, 300, 0.05)]
)
def test_rare_events_of_whole_conversations_at_the_margin_pass_about_as_often_as_alpha(
    champions: int, challengers: int, alpha: float
) -> None:
    rng, never, runs = np.random.default_rng(5), spoken(champions, first=5000), 400
    at_level = replace(RARE, alpha=alpha)
    held = sum(clustered_mean(at_level, never, spoken(challengers, 0.01, rng)).holds for _ in range(runs))
    assert held / runs < alpha + 3 * math.sqrt(alpha * (1 - alpha) / runs)


def test_the_least_conversations_of_a_rate_are_those_from_which_none_seen_holds() -> None:
    rules = {name: GATE.guardrails[name] for name in ("pii", "abstention", "length")}
    for size in (1, 5):
        least = least_conversations(rules, 0.05, size)
        assert set(least) == {"pii", "abstention"} and least["abstention"] < least["pii"]
        for count, holds in ((least["pii"], True), (least["pii"] - size, False)):
            arms = [silent(name, count, size) for name in ("a", "b")]
            assert guarded({"pii": rules["pii"]}, *arms, 0.05)[0].holds is holds


def silent(arm: str, conversations: int, size: int) -> Said:
    """Conversations of businesses of that size, of one harmless response each."""
    each = np.arange(conversations)
    texts = ["which room is it"] * conversations
    unit = np.array([f"{arm}{one}" for one in each // size], dtype=object)
    return Said(
        unit, texts, texts, np.zeros(conversations, dtype=bool), conversation=np.char.add(arm, each.astype(str))
    )


def test_rare_events_are_told_by_the_conversations_of_few_businesses() -> None:
    few = Sample(np.zeros(3000), np.arange(3000) % 30)
    assert clustered_mean(RARE, few, replace(few, unit=few.unit + 50)).missed
    told = replace(few, conversation=np.arange(3000))
    assert clustered_mean(RARE, told, replace(told, unit=few.unit + 50)).holds


def test_an_arm_of_few_units_has_their_degrees_of_freedom() -> None:
    rng = np.random.default_rng(6)
    many, few = (
        Sample(rng.standard_normal(3000), np.arange(3000)),
        Sample(rng.standard_normal(12), np.arange(5000, 5012)),
    )
    held = [clustered_mean(replace(LOWER, alpha=alpha), many, few) for alpha in (0.025, 0.05)]
    ratio = (held[0].loss_bound - held[0].loss) / (held[1].loss_bound - held[1].loss)
    assert ratio == pytest.approx(t.isf(0.025, 11) / t.isf(0.05, 11))


def test_what_the_logs_may_have_missed_is_left_to_the_ab_test() -> None:
    guardrails = (clustered_mean(RARE, spoken(225), spoken(225)),)
    decision = offline_gate(replace(GOOD, guardrails=guardrails))
    assert decision.verdict == "test"
    assert any(one.startswith("cannot tell from these logs: guardrail pii 0") for one in decision.reasons)
    assert outcome_gate(hackers.WON, guardrails).verdict == "reject"


def test_the_good_direction_says_what_is_a_loss() -> None:
    champion, challenger = texts("a b c d"), texts("a b")
    shorter = found(champion, challenger, up=rule("length", 0.2, "higher"), down=rule("length", 0.2, "lower"))
    assert not shorter["up"].holds and shorter["down"].holds
    assert shorter["up"].loss == pytest.approx(4.0) == -shorter["down"].loss


def test_a_relative_margin_is_a_share_of_the_champions_value() -> None:
    champion, challenger = texts("abcdefghij"), texts("abcdefghijkl")
    for margin, holds in ((0.19, False), (0.21, True)):
        result = found(champion, challenger, length=rule("length_p95", margin))["length"]
        assert result.holds == holds and result.margin == pytest.approx(10 * margin)
        assert (result.champion, result.challenger) == (10.0, 12.0)


def test_the_95th_percentile_sees_the_few_that_are_long() -> None:
    few = found(texts(*["ab"] * 20), texts(*["ab"] * 18, *["ab" * 20] * 2), p95=rule("length_p95", 1.0))
    assert not few["p95"].holds
    mean = found(texts(*["ab"] * 20), texts(*["ab"] * 19, "ab" * 5), p95=rule("length_p95", 1.0))
    assert mean["p95"].holds, "one in twenty is within it"


def test_a_limit_binds_whatever_the_champion_does() -> None:
    loop = texts("x x x x x")
    both = found(loop, loop, repetition=rule("repetition", 0.1, limit=0.5))
    assert both["repetition"].holds and not both["repetition, limit"].holds
    assert (both["repetition, limit"].champion, both["repetition, limit"].challenger) == (0.5, 0.75)
    assert found(loop, loop, repetition=rule("repetition", 0.1, limit=0.75))["repetition, limit"].holds
    assert "repetition, limit" not in found(loop, loop, repetition=rule("repetition"))


def test_too_few_conversations_or_no_numbers_do_not_hold() -> None:
    few = found(texts("a", units=9), texts("a", units=9), length=rule("length", 1.0))
    assert not few["length"].holds and math.isnan(few["length"].loss_bound)
    silent = found(texts("a"), texts(""), length=rule("length", 1.0))
    assert not silent["length"].holds, "who never speaks has no length to judge"


# --- measures --------------------------------------------------------------------------------------------------------


def test_what_a_source_cannot_know_is_not_judged_there() -> None:
    offline, arm = said(["a b"] * 60, 0.0), said(["a b"] * 60, 0.0, offline=False)
    names = {"kl", "unfinished", "acceptance", "calibration", "repetition"}
    rules = {name: rule(name) for name in names}
    assert set(found(offline, offline, **rules)) == {"kl", "unfinished", "repetition"}
    assert set(found(arm, arm, **rules)) == {"acceptance", "repetition"}


def test_every_default_guardrail_names_a_measure() -> None:
    for name, one in GATE.guardrails.items():
        assert one.function in MEASURES or one.function == "calibration", name
    with_everything = Said(
        unit=np.arange(300),
        texts=["Which room is it?"] * 300,
        pieces=[(4, 5, 6)] * 300,
        abstained=np.zeros(300, bool),
        finished=np.ones(300, bool),
        log_ratio=np.zeros(300),
        adoption=["verbatim"] * 300,
        reward=np.ones(300),
        calibration=Calibration([0.2], [0.2], [30], 0.01, 0.02),
    )
    results = guarded(GATE.guardrails, with_everything, with_everything, 0.05)
    assert {one.measure.removesuffix(", limit") for one in results} == set(GATE.guardrails)
    assert all(one.holds for one in results), "a champion is not worse than itself"


def test_kl_is_the_mean_log_ratio() -> None:
    near, far = said(["a b"] * 120, 4.9), said(["a b"] * 120, 5.1)
    champion = said(["a b"] * 120, 0.0)
    assert found(champion, near, kl=rule("kl", 5.0))["kl"].holds
    result = found(champion, far, kl=rule("kl", 5.0))["kl"]
    assert not result.holds and result.challenger == pytest.approx(5.1)
    unknown = said(["a b"] * 120, math.nan)
    assert not found(champion, unknown, kl=rule("kl", 5.0))["kl"].holds, "no number is no evidence"


def test_the_arms_of_an_ab_test_are_measured_from_their_turns() -> None:
    talks = collect(Script(0.6), Renovation(), 60, seed=1, policy_version="script")
    frame = to_frame(talks, {"purchase": 1.0}, 0.2)
    arm = Said.of_turns(frame)
    actions = [turn for talk in talks for turn in talk.turns if not turn.terminal]
    assert len(arm.texts) == len(actions) and len(set(arm.unit)) == 60
    shares = {name: MEASURES[name].values(arm) for name in ("acceptance", "abstained")}
    spoken = [turn for turn in actions if turn.suggestion and turn.suggestion.status == "suggested"]
    verbatim = [{"verbatim": 1.0, "edited": 0.5}.get(str(turn.adoption), 0.0) for turn in spoken]
    assert np.nanmean(shares["acceptance"]) == pytest.approx(np.mean(verbatim))
    assert shares["abstained"].mean() == pytest.approx(1 - len(spoken) / len(actions))
    rejected = frame.assign(adoption=frame["adoption"].where(frame["adoption"].isna(), "rejected"))
    result = found(arm, Said.of_turns(rejected), acceptance=rule("acceptance", 0.1, "higher"))["acceptance"]
    assert not result.holds and result.challenger == 0.0


def test_calibration_is_judged_against_what_chance_gives_a_perfect_q() -> None:
    champion = texts("a b")
    for error, holds in ((0.069, True), (0.081, False), (math.nan, False)):
        given = Said(
            champion.unit,
            champion.texts,
            champion.pieces,
            champion.abstained,
            calibration=Calibration([0.2], [0.3], [20], error, 0.03),
        )
        result = found(champion, given, calibration=rule("calibration", 0.05))["calibration"]
        assert result.holds == holds and (result.found == "broken") == (error == 0.081)
    off = calibrated(Guardrail("calibration", "lower", 0.05, 0.05), Calibration([0.2], [0.3], [20], 0.081, 0.03))
    assert off.reason == "calibration 0.081, chance 0.03 (margin 0.05)", "no champion, and no p"


@pytest.mark.parametrize(
    ("told", "holds"),
    [
        (lambda q, rng: q, True),
        (lambda q, rng: q**1.15, True),
        (lambda q, rng: 1 - q, False),
        (lambda q, rng: rng.random(len(q)), False),
        (lambda q, rng: np.clip(3 * q, 0, 1), False),
        (lambda q, rng: np.full(len(q), 0.9), False),
    ],
    ids=["perfect", "slightly off", "inverted", "noise", "three times", "constant"],
)
@pytest.mark.parametrize("gamma", [0.8, 1.0])
def test_a_calibration_that_is_wrong_breaks_and_a_perfect_one_does_not(told: Any, holds: bool, gamma: float) -> None:
    """Of 150 conversations, whatever the discount."""
    rng, given = np.random.default_rng(0), Guardrail("calibration", "lower", 0.05, 0.05)
    passed = 0
    for _ in range(10):
        chance, turns = rng.beta(2, 3, 150), rng.integers(2, 8, 150)
        ids = np.repeat(np.arange(150), turns)
        worth = gamma ** np.concatenate([np.arange(count)[::-1] for count in turns])
        won = (rng.random(150) < chance)[ids]
        passed += calibrated(given, calibration(told(worth * chance[ids], rng), worth * won, ids, draws=50)).holds
    assert passed >= 9 if holds else passed == 0


# --- a user's own ----------------------------------------------------------------------------------------------------


def own(monkeypatch: pytest.MonkeyPatch, function: Callable[[Said], Any]) -> GuardrailConfig:
    module = ModuleType("our_measures")
    module.politeness = function  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "our_measures", module)
    return rule("our_measures:politeness", 0.1, "higher")


def test_a_users_own_metric_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = own(monkeypatch, lambda said: np.array([float("please" in text) for text in said.texts]))
    polite, rude = texts("Which room, please?", units=40), texts("Which room?", units=40)
    assert found(polite, polite, politeness=mine)["politeness"].holds
    worse = found(polite, rude, politeness=mine)["politeness"]
    assert not worse.holds and (worse.champion, worse.challenger) == (1.0, 0.0)
    assert "politeness 0, champion 1" in worse.reason


def test_own_functions_that_do_not_serve_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    here = texts("a b")
    with pytest.raises(ConfigError, match=r"gate.guardrails.mine.*shape \(1,\), expected one number for each of 20"):
        found(here, here, mine=own(monkeypatch, lambda said: np.array([1.0])))
    assert found(here, here, mine=own(monkeypatch, lambda said: None)) == {}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("repetitions", r"'repetitions' is none of kl, .* \(did you mean 'repetition'\?\)"),
        ("no_such_module:f", "cannot be imported .*PYTHONPATH"),
        ("math:no_such_function", "cannot be imported"),
    ],
)
def test_a_function_that_is_not_there_is_named(function: str, words: str) -> None:
    with pytest.raises(ConfigError, match=rf"gate.guardrails.mine.function: .*{words}"):
        measure_of("mine", function)


# --- personal data ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Write to jane.doe+x@mail.example.co.uk, please.", "e-mail"),
        ("IBAN DE89 3704 0044 0532 0130 00.", "iban"),
        ("GB82WEST12345698765432", "iban"),
        ("Card 4111 1111 1111 1111, exp 12/27", "card"),
        ("5500-0000-0000-0004", "card"),
        ("SSN 536-90-4399", "us social security"),
        ("Log in from 192.168.10.254.", "ip address"),
        ("Call +44 20 7946 0958 now", "telephone"),
        ("Ruf an: 0171 2345678", "telephone"),
        ("(415) 555-2671", "telephone"),
        ("415-555-2671", "telephone"),
        ("+33 (0)1 42 68 53 00", "telephone"),
    ],
)
def test_personal_data_is_found_by_its_form(text: str, kind: str) -> None:
    assert [hit.kind for hit in pii.find(text)] == [kind]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "We can do your kitchen for 12,500 or 1 000 000.",
        "Between 2026-11-21 and 21.11.2026 10:30.",
        "Order 4111 1111 1111 1112 is no card.",
        "DE88370400440532013000",
        "Version 3.12.4, section 1.2.3.4.5, and 999.999.1.1.",
        "Follow @jane, it costs 5@3 for all.",
        "From 2020 to 2024, 15 rooms, 300 m2, 0.75 of it.",
    ],
)
def test_amounts_dates_and_numbers_are_not_personal_data(text: str) -> None:
    assert pii.find(text) == []


def test_check_digits_tell_cards_and_ibans_from_other_numbers() -> None:
    right = "4111111111111111"
    assert pii.luhn(right) and not any(pii.luhn(right[:-1] + digit) for digit in "023456789")
    assert pii.iban("DE89370400440532013000") and not pii.iban("DE89370400440532013001")


def test_a_text_counts_once_and_places_do_not_overlap() -> None:
    text = "a@b.example, c@d.example and 4111 1111 1111 1111"
    hits = pii.find(text)
    assert [hit.kind for hit in hits] == ["e-mail", "e-mail", "card"]
    assert [text[hit.start : hit.end] for hit in hits] == ["a@b.example", "c@d.example", "4111 1111 1111 1111"]
    assert pii.by_pattern([text, "nothing"]).tolist() == [1.0, 0.0]


def test_presidio_is_an_extra_that_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pii._presidio.cache_clear()
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    with pytest.raises(ConfigError, match=r"pip install 'iterative-ppo\[pii\]'"):
        pii.by_presidio(["a"])

    class AnalyzerEngine:
        def analyze(self, text: str, language: str, score_threshold: float) -> list[str]:
            return ["PERSON"] if "Jane" in text and score_threshold == 0.5 and language == "en" else []

    stand_in = ModuleType("presidio_analyzer")
    stand_in.AnalyzerEngine = AnalyzerEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "presidio_analyzer", stand_in)
    assert pii.by_presidio(["Jane said so", "she said so"]).tolist() == [1.0, 0.0]
    pii._presidio.cache_clear()


# --- reward hackers --------------------------------------------------------------------------------------------------


def test_a_healthy_challenger_passes_both_gates() -> None:
    assert passes(lambda text, rng: text, 0) == (True, True)


@pytest.mark.parametrize("name", HACKS)
def test_a_reward_hacker_passes_neither_gate(name: str) -> None:
    """Q, the certificate and customers praise it; its text alone must give it away."""
    assert passes(HACKS[name], seed=0) == (False, False)


def test_the_reasons_name_what_a_hacker_broke() -> None:
    rng = Random(0)
    before = usual(rng)
    decision = offline_gate(flattered(said(before, 0.0), said(["deal " * 60] * len(before), 2.0)))
    failed = [reason for reason in decision.reasons if reason.startswith("failed: ")]
    assert decision.reasons[: len(failed)] == tuple(failed)
    for word in ("guardrail length", "guardrail unfinished", "guardrail repetition", "guardrail compression"):
        assert any(word in reason for reason in failed)
    assert any(reason.startswith("passed: E[Q]") for reason in decision.reasons), "Q liked it"
