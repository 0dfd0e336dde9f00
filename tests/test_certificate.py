"""The certificate is its formula, has the right sign, is unbiased on the chain, and says when logs cannot tell."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.chain_logs import CHAIN, GAMMA, Log, behaviours, fitted_q, improved
from benchmarks.ope import TARGET, certificate_cell
from iterative_ppo.config import GateConfig, load_config
from iterative_ppo.evaluation.certificate import Certificate, certify
from iterative_ppo.evaluation.ope import LoggedTurns
from iterative_ppo.evaluation.weights import NO_LOG_PROBS


@pytest.fixture(scope="module")
def limits() -> GateConfig:
    return load_config().gate


def logged(champion: np.ndarray, challenger: np.ndarray, conversations: int, seed: int) -> LoggedTurns:
    """Evidence of the chain, with Q and V fitted on other conversations."""
    q, v = fitted_q(Log.sample(champion, conversations, seed + 1), champion)
    log = Log.sample(champion, conversations, seed)
    return log.turns(challenger, q, v, np.zeros(len(log.state)))


def single_turn_gain(champion: np.ndarray, challenger: np.ndarray) -> float:
    visits = CHAIN.start @ CHAIN.visits(champion, GAMMA)
    return float(visits @ ((challenger - champion) * CHAIN.q_pi(champion, GAMMA)).sum(axis=1))


def test_it_is_the_mean_over_conversations_written_out(limits: GateConfig) -> None:
    champion = behaviours()["round 0"]
    turns = logged(champion, improved(champion, 0.3), 400, 0)
    total, discount = 0.0, 1.0
    for row, last in enumerate(turns.last):
        rho = math.exp(turns.log_ratio[row])
        total += discount * (rho - 1) * (turns.returns[row] - turns.baseline[row])
        discount = 1.0 if last else discount * GAMMA
    found = certify(turns, limits)
    assert found.gain == pytest.approx(total / 400)
    assert (found.conversations, found.left_out, found.support.known) == (400, 0, len(turns.last))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_better_policy_is_supported_and_a_worse_one_blocked(seed: int, limits: GateConfig) -> None:
    for champion in behaviours().values():
        better, worse = (
            certify(logged(champion, improved(champion, 0.05, s), 3000, seed), limits) for s in (1.0, -1.0)
        )
        assert better.refusal is None and better.low > 0 and "single-turn gain +" in better.reason
        assert worse.refusal is None and worse.high < 0


def test_it_is_unbiased_for_the_single_turn_gain_whatever_the_baseline(limits: GateConfig) -> None:
    """200,000 conversations; a baseline of noise widens it and moves nothing."""
    champion = behaviours()["round 1"]
    challenger, cheap = improved(champion, 0.3), limits.model_copy(update={"draws": 100})
    turns = logged(champion, challenger, 200_000, 5)
    truth, wrong = single_turn_gain(champion, challenger), np.random.default_rng(0).random(CHAIN.states)
    noise = replace(turns, baseline=wrong[np.arange(len(turns.last)) % CHAIN.states])
    for one in (turns, noise):
        found = certify(one, cheap)
        error = (found.high - found.low) / 2 / 1.645
        assert abs(found.gain - truth) < 3.5 * error < 0.05


def test_it_is_not_the_difference_of_values(limits: GateConfig) -> None:
    """What it promises and what customers would see differ, as its docstring says."""
    champion = behaviours()["round 0"]
    challenger = improved(champion, 0.5)
    gain = CHAIN.value(challenger, GAMMA) - CHAIN.value(champion, GAMMA)
    assert abs(single_turn_gain(champion, challenger) - gain) > 0.02


def test_bounds_cover_on_the_chain() -> None:
    """100 replications here, 1,000 in `make bench-gate`."""
    least = TARGET - 3 * math.sqrt(TARGET * (1 - TARGET) / 100)
    for name, champion in behaviours().items():
        for kl, sign, seed in ((0.05, 1.0, 10), (0.5, -1.0, 20)):
            cell = certificate_cell(champion, improved(champion, kl, sign), 500, 100, seed)
            assert cell.told >= 90 and cell.coverage >= least, (name, kl)


def test_a_challenger_that_does_nothing_is_neither_supported_nor_blocked(limits: GateConfig) -> None:
    champion = behaviours()["round 1"]
    found = certify(logged(champion, champion, 500, 3), limits)
    assert found.gain == 0.0 and found.low < 0 < found.high and found.refusal is None
    assert found.support.effective == pytest.approx(found.support.known)


# --- refusals --------------------------------------------------------------------------------------------------------


def some(limits: GateConfig, conversations: int = 500) -> tuple[LoggedTurns, Certificate]:
    champion = behaviours()["round 0"]
    turns = logged(champion, improved(champion, 0.2), conversations, 7)
    return turns, certify(turns, limits)


def test_logs_without_log_probs_are_refused(limits: GateConfig) -> None:
    turns, _ = some(limits)
    found = certify(replace(turns, log_ratio=np.full(len(turns.last), np.nan)), limits)
    assert found.refusal == NO_LOG_PROBS == "these logs carry no behaviour log-probs"
    assert found.left_out == len(turns.last) and NO_LOG_PROBS in found.reason


def test_turns_without_a_log_prob_are_left_out_and_counted(limits: GateConfig) -> None:
    turns, whole = some(limits)
    unknown = np.arange(len(turns.last)) % 10 == 0
    found = certify(replace(turns, log_ratio=np.where(unknown, np.nan, turns.log_ratio)), limits)
    assert found.left_out == unknown.sum() and found.support.known == (~unknown).sum()
    edge = (turns.ratio - 1) * (turns.returns - turns.baseline) * turns.discount
    assert found.gain == pytest.approx(whole.gain - edge[unknown].sum() / 500)
    assert f"{unknown.sum()} turns without a log-prob are left out" in found.reason


def test_too_few_turns_and_too_heavy_ones_are_refused(limits: GateConfig) -> None:
    turns, whole = some(limits)
    assert whole.refusal is None
    few = certify(turns.rows(turns.conversation < 30), limits)
    assert few.refusal is not None and "at least 200" in few.reason
    heavy = turns.log_ratio.copy()
    heavy[3] = math.log(0.06 * len(heavy))
    assert "one weight holds" in certify(replace(turns, log_ratio=heavy), limits).reason


def test_what_the_logs_never_saw_is_noticed(limits: GateConfig) -> None:
    """A hacker that says in half of all turns what the champion never would: rho is 1/2 where it does not."""
    turns, _ = some(limits)
    hacked = certify(replace(turns, log_ratio=np.full(len(turns.last), math.log(0.5))), limits)
    assert hacked.support.effective == pytest.approx(len(turns.last)), "an effective size that sees nothing"
    assert hacked.refusal == "the logs hold 50% of what the challenger does (at least 90%)"


def test_heavier_weights_widen_the_bounds(limits: GateConfig) -> None:
    """The lower bound must survive one more conversation that goes as badly as the heaviest weight allows."""
    turns, whole = some(limits)
    reach = float(turns.ratio.max())
    mean = np.add.reduceat(
        (turns.ratio - 1) * (turns.returns - turns.baseline) * turns.discount, np.flatnonzero(turns.first)
    )
    error = mean.std() / math.sqrt(500)
    assert whole.high - whole.low > 2 * 1.5 * error + 2 * 0.9 * reach / 501


def test_the_range_of_outcomes_sets_how_badly_it_may_go(limits: GateConfig) -> None:
    turns, whole = some(limits)
    wide = certify(replace(turns, low=-10.0, high=10.0), limits)
    assert wide.gain == whole.gain and wide.low < whole.low and wide.high > whole.high
