"""Off-policy estimates agree with plain loops, cover the chain's exact values, and refuse where logs are too thin."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from benchmarks.chain_logs import CHAIN, GAMMA, Log, behaviours, divergence, fitted_q, improved, sampled_q
from benchmarks.ope import REPLICATIONS, TARGET, certificate_cell, ope_cells, rows
from iterative_ppo.config import GateConfig, load_config
from iterative_ppo.errors import NothingToLearn
from iterative_ppo.evaluation.bootstrap import Interval, OneMore, ratio_interval
from iterative_ppo.evaluation.ope import BLIND, INCOMPLETE, LoggedTurns, doubly_robust, estimates, per_decision
from iterative_ppo.evaluation.weights import NO_LOG_PROBS, support, unweighted
from iterative_ppo.learning import training
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.objective import outcome_range
from iterative_ppo.learning.optimization import descend
from iterative_ppo.learning.q_model import QModel, QSettings
from iterative_ppo.learning.rounds import round_of
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.turn_table import to_frame
from tasks.datasets import Dataset
from tasks.gating import fqe, gate_stage, gather, telling
from tasks.learning import PolicyVersion, fit_q_stage

WEIGHTED = ("wis", "per_decision", "doubly_robust", "doubly_robust_gain")


@pytest.fixture(scope="module")
def limits() -> GateConfig:
    return load_config(overrides={"gate.draws": 400}).gate


def some_turns(conversations: int = 300, seed: int = 0, spread: float = 0.2) -> LoggedTurns:
    """Made-up turns: conversations of 1 to 5, any numbers; the weights are those of no policy."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 6, conversations)
    last = np.zeros(size.sum(), bool)
    last[np.cumsum(size) - 1] = True
    draw = rng.random((4, len(last)))
    reward = np.where(last, (draw[0] < 0.3).astype(float), 0.0)
    log_ratio = spread * rng.standard_normal(len(last))
    return LoggedTurns(last, reward, log_ratio, draw[1], draw[2], draw[3], GAMMA, 0.0, 1.0)


def talks(turns: LoggedTurns) -> list[list[int]]:
    """Row numbers by conversation, in plain Python."""
    found: list[list[int]] = [[]]
    for row, last in enumerate(turns.last):
        found[-1].append(row)
        if last:
            found.append([])
    return found[:-1]


# --- the bootstrap ---------------------------------------------------------------------------------------------------


def test_a_ratios_bounds_are_those_of_the_normal_for_a_large_even_sample() -> None:
    values = np.random.default_rng(0).standard_normal(4000)
    found = ratio_interval(values, np.ones(4000), 0.95, 2000)
    half = norm.ppf(0.95) * values.std() / math.sqrt(4000)
    assert found.estimate == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.12 * half)


def test_bounds_of_a_ratio_cover_it_where_numerator_and_denominator_vary_together() -> None:
    rng, covered = np.random.default_rng(1), []
    for _ in range(300):
        denominator = rng.exponential(size=150)
        found = ratio_interval(denominator * rng.random(150), denominator, 0.95, 300)
        covered.append((found.low <= 0.5, found.high >= 0.5))
    assert np.mean(covered, axis=0).min() > 0.95 - 3 * math.sqrt(0.05 * 0.95 / 300)
    assert np.mean(covered) < 0.99, "not so wide that nothing could miss"


def test_skewness_moves_the_bounds_to_the_side_of_the_long_tail() -> None:
    """400 samples of a log-normal: the upper bound reaches further than the lower one, or it would cover too seldom."""
    rng, missed, lean = np.random.default_rng(2), np.zeros(2), []
    for _ in range(400):
        values = rng.lognormal(sigma=1.0, size=80)
        found = ratio_interval(values, np.ones(80), 0.95, 300)
        lean.append((found.high - found.estimate) / (found.estimate - found.low))
        missed += [found.high < math.exp(0.5), found.estimate + norm.ppf(0.95) * values.std() / 9 < math.exp(0.5)]
    assert np.median(lean) > 1.2
    assert missed[0] < 0.75 * missed[1]


def test_few_or_equal_values_have_no_width_or_no_bounds() -> None:
    alike = ratio_interval(np.full(20, 0.25), np.ones(20), 0.95, 200)
    assert (alike.estimate, alike.low, alike.high) == (0.25, 0.25, 0.25)
    for values in (np.ones(1), np.zeros(0), np.array([1.0, math.inf]), np.array([1.0, math.nan])):
        found = ratio_interval(values, np.ones(len(values)), 0.95, 200)
        assert math.isnan(found.low) and math.isnan(found.high)
    assert math.isnan(ratio_interval(np.ones(5), np.zeros(5), 0.95, 200).estimate)


def test_one_more_conversation_widens_by_what_it_weighs() -> None:
    found = Interval(0.5, 0.4, 0.6).beside(OneMore(1.0, -10.0, 10.0), 99.0)
    assert (found.low, found.high) == pytest.approx(((99 * 0.4 - 10) / 100, (99 * 0.6 + 10) / 100))
    narrow = Interval(0.5, 0.0, 1.0).beside(OneMore(1.0, 0.0, 1.0), 9.0)
    assert (narrow.low, narrow.high) == (0.0, 1.0), "bounds never move inwards"
    lost = Interval(0.5, math.nan, math.nan).beside(OneMore(1.0, 0.0, 1.0), 9.0)
    assert math.isnan(lost.low) and math.isnan(lost.high)


def test_the_same_data_give_the_same_bounds_and_large_samples_go_in_blocks() -> None:
    rng = np.random.default_rng(3)
    values = rng.random(60_000)
    one, again = (ratio_interval(values, np.ones(60_000), 0.95, 200) for _ in range(2))
    assert one == again
    half = norm.ppf(0.95) * values.std() / math.sqrt(60_000)
    assert one.high - one.estimate == pytest.approx(half, rel=0.25)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_support_longhand() -> None:
    weight = np.array([0.5, 1.0, 2.5, 0.1])
    found = support(np.log(weight))
    assert found.known == 4
    assert found.effective == pytest.approx(weight.sum() ** 2 / (weight**2).sum())
    assert found.largest == pytest.approx(2.5 / weight.sum())
    assert found.mean == pytest.approx(weight.mean())


def test_weights_beyond_what_numbers_hold_are_told_in_logarithms() -> None:
    for shift in (5000.0, -5000.0):
        found = support(shift + np.log([1.0, 3.0]))
        assert (found.effective, found.largest) == pytest.approx((16 / 10, 0.75))
    nothing = support(np.full(3, -np.inf))
    assert nothing.effective == 0.0 and nothing.mean == 0.0
    assert support(np.zeros(0)).known == 0


@pytest.mark.parametrize(
    ("log_weight", "words"),
    [
        (np.zeros(0), NO_LOG_PROBS),
        (np.zeros(199), "the logs are worth 199 of the challenger's own"),
        (np.append(np.zeros(3000), math.log(170)), "one weight holds 5.4% of all"),
        (np.full(1000, math.log(0.85)), "the logs hold 85% of what the challenger does"),
        (np.full(1000, -np.inf), "the logs are worth 0"),
    ],
)
def test_what_too_little_support_is_refused_for(log_weight: np.ndarray, words: str, limits: GateConfig) -> None:
    assert words in str(support(log_weight).refusal(limits))


def test_good_support_is_not_refused(limits: GateConfig) -> None:
    assert support(np.zeros(200)).refusal(limits) is None
    assert unweighted(200).refusal(limits) is None
    strict = limits.model_copy(update={"min_effective": 201.0})
    assert support(np.zeros(200)).refusal(strict) is not None, "the limits are the configured ones"


# --- estimators longhand ---------------------------------------------------------------------------------------------


def test_turns_know_their_place() -> None:
    turns = some_turns(40)
    for talk in talks(turns):
        assert turns.discount[talk] == pytest.approx([GAMMA**t for t in range(len(talk))])
        assert turns.first[talk].tolist() == [True] + [False] * (len(talk) - 1)
    assert turns.conversation.max() == 39
    assert turns.sums(np.ones(len(turns.last))).tolist() == [len(talk) for talk in talks(turns)]


def test_per_decision_and_doubly_robust_are_their_recursions_written_out() -> None:
    turns = some_turns(60)
    decided, robust = per_decision(turns), doubly_robust(turns)
    for number, talk in enumerate(talks(turns)):
        plain = model = 0.0
        for row in reversed(talk):
            rho = math.exp(turns.log_ratio[row])
            plain = rho * (turns.reward[row] + GAMMA * plain)
            model = turns.sampled_q[row] + rho * (turns.reward[row] + GAMMA * model - turns.q[row])
        assert (decided[number], robust[number]) == pytest.approx((plain, model))


def test_weighted_importance_sampling_longhand(limits: GateConfig) -> None:
    turns = some_turns(60)
    weight, returned = [], []
    for talk in talks(turns):
        weight.append(math.exp(sum(turns.log_ratio[row] for row in talk)))
        returned.append(sum(GAMMA**t * turns.reward[row] for t, row in enumerate(talk)))
    expected = sum(w * g for w, g in zip(weight, returned, strict=True)) / sum(weight)
    assert estimates(turns, limits)["wis"].value == pytest.approx(expected)
    assert turns.heaviest == pytest.approx(
        max(math.exp(sum(turns.log_ratio[talk[: k + 1]])) for talk in talks(turns) for k in range(len(talk)))
    )


def test_a_challenger_that_is_the_champion_is_worth_what_the_champion_is(limits: GateConfig) -> None:
    turns = some_turns(300, spread=0.0)
    found = estimates(turns, limits)
    for name in ("wis", "per_decision"):
        assert found[name].value == pytest.approx(found["logged"].value)
        assert found[name].refusal is None and found[name].support.effective == pytest.approx(300)
    assert found["logged"].value == pytest.approx(turns.returns[turns.first].mean())
    exact = replace(turns, sampled_q=turns.q)
    assert estimates(exact, limits)["doubly_robust_gain"].value == pytest.approx(0.0, abs=1e-12)


def test_ratios_beyond_what_numbers_hold_are_refused_without_a_warning(limits: GateConfig) -> None:
    turns = some_turns(300)
    wild = replace(turns, log_ratio=np.where(np.arange(len(turns.last)) % 50 == 0, 4000.0, turns.log_ratio))
    with np.errstate(over="raise", divide="raise", invalid="raise"):
        found = estimates(wild, limits)
    assert all(found[name].refusal for name in WEIGHTED)


def test_an_action_that_the_challenger_never_takes_weighs_nothing(limits: GateConfig) -> None:
    turns = some_turns(600, spread=0.0)
    never = np.random.default_rng(0).random(len(turns.last)) < 0.01
    found = estimates(replace(turns, log_ratio=np.where(never, -np.inf, 0.0)), limits)
    hit = turns.sums(never) > 0
    own = turns.returns[turns.first]
    assert found["wis"].value == pytest.approx(own[~hit].mean())
    assert found["per_decision"].value == pytest.approx(own[~hit].sum() / 600)
    assert found["wis"].left_out == 0, "probability 0 is known, other than none"


# --- what is not known -----------------------------------------------------------------------------------------------


def test_conversations_with_an_unknown_log_prob_are_left_out_and_counted(limits: GateConfig) -> None:
    turns = some_turns(600)
    unknown = np.zeros(len(turns.last), bool)
    unknown[[talk[0] for talk in talks(turns)[:40]]] = True
    found = estimates(replace(turns, log_ratio=np.where(unknown, np.nan, turns.log_ratio)), limits)
    rest = turns.rows(turns.conversation >= 40)
    for name in WEIGHTED:
        assert found[name].left_out == 40 and found[name].support.known == 560
        assert found[name].value == pytest.approx(estimates(rest, limits)[name].value)
    assert found["logged"].left_out == 0


def test_logs_without_any_log_prob_are_refused(limits: GateConfig) -> None:
    turns = some_turns(300)
    found = estimates(replace(turns, log_ratio=np.full(len(turns.last), np.nan)), limits)
    for name in WEIGHTED:
        assert found[name].refusal == INCOMPLETE and math.isnan(found[name].value)
    assert found["logged"].refusal is None, "what the champion reached needs no log-prob"


def test_states_that_were_not_sampled_cost_only_the_estimates_that_need_q(limits: GateConfig) -> None:
    turns = some_turns(600)
    part = replace(turns, sampled_q=np.where(turns.conversation < 300, turns.sampled_q, np.nan))
    found = estimates(part, limits)
    assert (found["wis"].left_out, found["doubly_robust"].left_out, found["q_model"].left_out) == (0, 300, 300)
    assert found["doubly_robust"].refusal is None
    nothing = estimates(replace(turns, sampled_q=np.full(len(turns.last), np.nan)), limits)
    assert nothing["doubly_robust"].refusal == INCOMPLETE and nothing["wis"].refusal is None


def test_what_q_alone_says_has_no_bounds_to_trust(limits: GateConfig) -> None:
    turns = some_turns(300)
    found = estimates(turns, limits)["q_model"]
    assert found.value == pytest.approx(turns.sampled_q[turns.first].mean())
    assert found.refusal == BLIND
    own = estimates(turns, limits, model="fqe")["fqe"]
    assert (own.value, own.refusal) == (found.value, BLIND)


# --- on the chain ----------------------------------------------------------------------------------------------------


def test_doubly_robust_is_unbiased_with_a_wrong_q() -> None:
    """100,000 conversations, Q a table of noise; the direct method with the same Q is far off."""
    champion = behaviours()["round 1"]
    challenger = improved(champion, 0.1)
    wrong = np.random.default_rng(0).random(CHAIN.reward.shape)
    log = Log.sample(champion, 100_000, 1)
    turns = log.turns(challenger, wrong, np.zeros(CHAIN.states), sampled_q(log, challenger, wrong, 2, 2))
    truth, robust = CHAIN.value(challenger, GAMMA), doubly_robust(turns)
    error = robust.std() / math.sqrt(len(robust))
    assert abs(robust.mean() - truth) < 3.3 * error and error < 0.01
    assert abs(turns.sampled_q[turns.first].mean() - truth) > 10 * error
    assert abs(per_decision(turns).mean() - truth) < 3.3 * per_decision(turns).std() / math.sqrt(len(robust))


def test_a_good_q_makes_doubly_robust_narrower_than_importance_sampling(limits: GateConfig) -> None:
    champion = behaviours()["round 0"]
    challenger = improved(champion, 0.1)
    q, v = fitted_q(Log.sample(champion, 5000, 3), challenger)
    assert np.abs(q - CHAIN.q_pi(challenger, GAMMA)).mean() < 0.05, "FQE on tables finds the challenger's Q"
    log = Log.sample(champion, 2000, 4)
    turns = log.turns(challenger, q, v, sampled_q(log, challenger, q, 4, 5))
    found = estimates(turns, limits)
    assert doubly_robust(turns).std() < 0.9 * per_decision(turns).std()
    truth = CHAIN.value(challenger, GAMMA)
    for name in ("wis", "per_decision", "doubly_robust"):
        assert found[name].low < truth < found[name].high


def test_bounds_cover_on_the_chain() -> None:
    """100 replications here, 1,000 in `make bench-gate`; a challenger better and one worse, away from the champion."""
    least = TARGET - 3 * math.sqrt(TARGET * (1 - TARGET) / 100)
    champion = behaviours()["round 1"]
    for sign, kl, seed in ((1.0, 0.08, 10), (-1.0, 0.05, 20)):
        challenger = improved(champion, kl, sign)
        assert divergence(challenger, champion) == pytest.approx(kl, rel=0.05)
        q, _ = fitted_q(Log.sample(champion, 1000, seed + 1), challenger)
        for name, cell in ope_cells(champion, challenger, q, 700, 100, seed).items():
            if name != "q_model":
                assert cell.told >= 75 and cell.coverage >= least, name


def test_far_challengers_are_refused_not_misjudged() -> None:
    champion = behaviours()["round 2"]
    cell = certificate_cell(champion, improved(champion, 2.5, -1.0), 300, 40, 30)
    assert cell.told <= 2
    q = CHAIN.q_pi(champion, GAMMA)
    cells = ope_cells(champion, improved(champion, 1.0, -1.0), q, 300, 40, 31)
    assert all(cells[name].told == 0 for name in WEIGHTED)


# --- in the gate -----------------------------------------------------------------------------------------------------


def test_a_q_of_the_challengers_own_that_the_log_does_not_support_is_refused_and_the_night_goes_on(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path
) -> None:
    outcomes, place = {"purchase": 1.0}, tmp_path / "turns" / "turns.parquet"
    frame = to_frame(scripted[:30], outcomes, 0.4)
    logged = frame["behaviour_logprob"].mask(turn_table.actions(frame), -3.0)
    turn_table.write(frame.assign(behaviour_logprob=logged), place, outcomes)
    tiny_policy.save(tmp_path / "policy")
    policy, dataset = PolicyVersion(1, tmp_path / "policy", "script"), Dataset(0, place.parent, "md5")
    config = load_config(
        overrides={"data.root": tmp_path, "gate.fqe": True, "gate.samples": 1, "q.epochs": 0.5, "q.value_epochs": 0.5}
        | {"q.effective_size_floor": 1e6, "gate.states": 20}
    )
    q = fit_q_stage(config, policy, dataset, tmp_path / "round")
    evidence, shown = gather(config, policy, policy.path, q.path, dataset, tmp_path)
    assert evidence.differing == 0 and all(one["champion"] == one["challenger"] for one in shown)
    refused = evidence.estimates["fqe"]
    assert refused.refusal is not None and "fewer than q.effective_size_floor = 1e+06" in refused.refusal
    assert math.isnan(refused.value) and refused.left_out == evidence.certificate.conversations
    assert evidence.estimates["q_model"].refusal == BLIND and "doubly_robust_gain" in evidence.estimates
    assert evidence.as_dict()["estimates"]["fqe"]["value"] is None
    turn_table.write(frame.assign(part="fit"), tmp_path / "fit" / "turns.parquet", outcomes)
    with pytest.raises(NothingToLearn, match="no held-out conversation"):  # the next round may have some
        gather(config, policy, policy.path, q.path, Dataset(0, tmp_path / "fit", "md5"), tmp_path)


def test_the_reports_examples_are_states_in_which_the_policies_differ() -> None:
    differ = np.isin(np.arange(100), np.arange(30, 90, 3))
    many, few = telling(differ), telling(np.isin(np.arange(100), [3, 50, 99]))
    assert len(many) == len(set(many)) == 8 and differ[many].all() and (many[0], many[-1]) == (30, 87)
    assert list(few[:3]) == [3, 50, 99] and len(set(few)) == 8 and (few[3], few[-1]) == (0, 98)
    assert list(telling(np.array([False, True]))) == [1, 0] and telling(np.zeros(0, dtype=bool)).size == 0


def test_a_killed_gate_goes_on_with_the_challengers_own_q(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, updates = tmp_path / "turns" / "turns.parquet", list[int]()
    frame = to_frame(scripted[:30], {"purchase": 1.0}, 0.4)
    logged = tiny_policy.score(round_of(tiny_policy, frame, load_config()).encoded)
    turn_table.write(frame.assign(behaviour_logprob=logged), place, {"purchase": 1.0})
    tiny_policy.save(tmp_path / "policy")
    policy, dataset = PolicyVersion(1, tmp_path / "policy", "script"), Dataset(0, place.parent, "md5")
    quick = {"q.epochs": 0.5, "q.value_epochs": 0.5, "q.iterations": 3, "q.effective_size_floor": 1.0}
    config = load_config(overrides={"gate.fqe": True, "gate.samples": 1, "gate.states": 20} | quick)
    q = fit_q_stage(config, policy, dataset, tmp_path / "whole")

    def counted(*given: Any) -> dict[str, float]:
        if len(updates) == limit:
            raise KeyboardInterrupt
        updates.append(1)
        return descend(*given)

    monkeypatch.setattr(training, "descend", counted)
    gate, limit = (config, policy, policy.path, q.path, dataset), 10**6
    whole, asked = gate_stage(*gate, tmp_path / "whole"), len(updates)
    updates.clear()
    limit = asked - 1
    with pytest.raises(KeyboardInterrupt):
        gate_stage(*gate, tmp_path / "killed")
    updates.clear()
    again = gate_stage(*gate, tmp_path / "killed")
    assert 0 < len(updates) < asked / 2, "what was done is not done again"
    assert again.read("evidence.json") == whole.read("evidence.json")
    assert whole.read("evidence.json")["estimates"]["fqe"]["refusal"] == BLIND, "it was fitted"
    assert not list(tmp_path.glob("*/judging"))


@pytest.mark.parametrize("changes", [{"credit.assigner": "itpo"}, {"improve.reward": "acceptance"}])
def test_a_q_of_the_challengers_own_is_about_what_the_estimates_are(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], changes: dict[str, str]
) -> None:
    wide = {"outcomes": {"purchase": 2.0}, "data.outcome_high": 3.0, "q.epochs": 0.2, "q.value_epochs": 0.2}
    config = load_config(overrides=wide | changes)
    current = round_of(tiny_policy, to_frame(scripted[:20], config.outcomes, 0.2), config)
    start = QModel.from_policy(tiny_policy, QSettings.of(config), seed=0)
    own = fqe(tiny_policy, start, current, config)
    if "credit.assigner" in changes:
        assert (own.settings.low, own.settings.high) == outcome_range(config) == (0.0, 6.0)
    else:
        assert own is start, "acceptance looks no further than its own turn, whoever goes on"


@pytest.mark.slow
def test_every_row_of_the_benchmark_holds() -> None:
    failed = [row["figure"] for row in rows(REPLICATIONS) if row["holds"] is False]
    assert not failed
