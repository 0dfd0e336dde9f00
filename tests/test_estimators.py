"""Estimators of Q^pi: their targets written out, exact on the enumerable chain, and what each may learn from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize

from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.chain import ACTIONS, Chain, greedy
from iterative_ppo.errors import ConfigError, NothingToLearn, TrainingError, TurnTableError
from iterative_ppo.evaluation.metrics import calibration, calibrator, recalibrated
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.estimators import Estimator, Transitions, estimator_of
from iterative_ppo.learning.estimators.network import Log, Network
from iterative_ppo.learning.estimators.table import Table, enumerated
from iterative_ppo.learning.forward import backbone, last_hidden
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.policy_evaluation import Round, checked, effective_size, fit_q, logged_rows
from iterative_ppo.learning.q_model import QModel, QSettings
from iterative_ppo.learning.rounds import round_from, round_of
from iterative_ppo.learning.sequences import SequenceFile
from iterative_ppo.mdp import returns, turn_table
from iterative_ppo.mdp.conversation import MISSING, Conversation, Turn
from iterative_ppo.mdp.returns import (
    backward_recursion,
    discounted_returns,
    lambda_returns,
    one_step_targets,
    retrace_targets,
)
from iterative_ppo.mdp.turn_table import to_frame

torch.set_num_threads(1)

TARGETS = ("monte_carlo", "one_step", "td_lambda", "sarsa", "fqe", "retrace", "lstd_q", "archer")
GAMMA = 0.95
CHAIN = Chain.default()
SHARE = st.floats(0, 1)
light = settings(deadline=None, max_examples=60)

# --- targets, written out --------------------------------------------------------------------------------------------


@st.composite
def logs(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Some conversations: each has actions, then a terminal row; actions and log-ratios may be missing."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5))
    rows = sum(lengths) + len(lengths)
    last = np.zeros(rows, bool)
    last[np.cumsum(np.array(lengths) + 1) - 1] = True
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    action = ~last & (rng.random(rows) < 0.8)
    return {
        "reward": np.where(last, 0.0, rng.normal(size=rows)),
        "last": last,
        "q": np.where(action, rng.normal(size=rows), np.nan),
        "v": np.where(last, np.nan, rng.normal(size=rows)),
        "log_ratio": np.where(action & (rng.random(rows) < 0.8), rng.normal(size=rows), np.nan),
    }


def ahead(log: dict[str, np.ndarray], name: str, i: int) -> float:
    """A value of the next row, 0 where that is terminal."""
    return 0.0 if log["last"][i + 1] else float(log[name][i + 1])


@light
@given(logs(), st.floats(0, 0.99), SHARE)
def test_lambda_returns_are_the_recursion_written_out(log: dict[str, np.ndarray], gamma: float, lam: float) -> None:
    found = lambda_returns(log["reward"], log["last"], log["q"], gamma, lam)
    for i in range(len(found) - 1, -1, -1):
        if log["last"][i]:
            assert found[i] == 0.0
            continue
        x, share = ahead(log, "q", i), lam
        if math.isnan(x):
            x, share = 0.0, 1.0
        later = 0.0 if log["last"][i + 1] else found[i + 1]
        assert found[i] == pytest.approx(log["reward"][i] + gamma * ((1 - share) * x + share * later))


@light
@given(logs(), st.floats(0, 0.99))
def test_lambda_0_and_1_are_one_step_and_monte_carlo(log: dict[str, np.ndarray], gamma: float) -> None:
    reward, last, v = log["reward"], log["last"], log["v"]
    assert np.allclose(lambda_returns(reward, last, v, gamma, 0.0), one_step_targets(reward, last, v, gamma))
    assert np.allclose(lambda_returns(reward, last, v, gamma, 1.0), discounted_returns(reward, last, gamma))
    expected = [reward[i] + (0.0 if last[i] else gamma * ahead(log, "v", i)) for i in range(len(last))]
    assert np.allclose(one_step_targets(reward, last, v, gamma), expected)


@light
@given(logs(), st.floats(0, 0.99), SHARE)
def test_retrace_targets_are_the_double_sum(log: dict[str, np.ndarray], gamma: float, lam: float) -> None:
    """Q(s_i, a_i) + sum_j gamma^{j-i} (prod_{l=i+1..j} c_l) delta_j over rows j with an action, cut without a ratio.

    A delta reaches to the next such row, past the rewards of those between.
    """
    reward, last, q = log["reward"], log["last"], log["q"]
    found = retrace_targets(reward, last, q, log["v"], log["log_ratio"], gamma, lam)
    for i in range(len(last)):
        if math.isnan(q[i]):
            assert math.isnan(found[i])
            continue
        total, trace, j = q[i], 1.0, i
        while True:
            k = next(k for k in range(j + 1, len(last)) if last[k] or not math.isnan(q[k]))
            paid = sum(gamma ** (m - j) * reward[m] for m in range(j, k))
            total += gamma ** (j - i) * trace * (paid + gamma ** (k - j) * (0.0 if last[k] else log["v"][k]) - q[j])
            j = k
            if last[j] or math.isnan(log["log_ratio"][j]):
                break
            trace *= lam * min(1.0, math.exp(log["log_ratio"][j]))
        assert found[i] == pytest.approx(total)


def test_retrace_of_the_policys_own_conversations_is_the_return_when_v_is_right_for_the_logged_actions() -> None:
    """rho = 1, lambda = 1 and E_pi Q(s, .) = Q(s, a): the sum of deltas telescopes, whatever Q says."""
    reward, last = np.array([0.0, 0.5, 1.0, 0.0]), np.array([False, False, False, True])
    q = np.array([0.3, -0.2, 0.9, np.nan])
    assert np.allclose(retrace_targets(reward, last, q, q, np.zeros(4), 0.9, 1.0)[:3], [0.45 + 0.81, 0.5 + 0.9, 1.0])


def test_a_huge_ratio_does_not_overflow_and_a_vanishing_one_cuts() -> None:
    reward, last = np.zeros(3), np.array([False, False, True])
    q, v = np.array([0.5, 0.25, np.nan]), np.array([0.1, 0.75, np.nan])
    one, huge = (retrace_targets(reward, last, q, v, np.array([0.0, r, np.nan]), 0.5, 1.0)[0] for r in (0.0, 1e5))
    gone, never, missing = (
        retrace_targets(reward, last, q, v, np.array([0.0, r, np.nan]), 0.5, 1.0)[0] for r in (-1e5, -np.inf, np.nan)
    )
    assert one == huge == pytest.approx(0.5 * 0.75 - 0.5 * 0.25)
    assert gone == never == missing == pytest.approx(0.5 * 0.75)


@light
@given(logs(), st.integers(1, 4), st.integers(1, 7))
def test_blocks_and_columns_change_nothing(log: dict[str, np.ndarray], columns: int, block: int) -> None:
    rng = np.random.default_rng(len(log["last"]))
    last, shape = log["last"], (len(log["last"]), columns)
    constant, coefficient = rng.normal(size=shape), rng.uniform(-1, 1, shape)
    expected = constant.copy()
    for i in np.flatnonzero(~last)[::-1]:
        expected[i] += coefficient[i] * expected[i + 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(returns, "BLOCK", block)
        assert np.allclose(backward_recursion(constant, coefficient, last), expected)
        assert np.allclose(backward_recursion(constant[:, 0], coefficient[:, 0], last), expected[:, 0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_is_refused_not_spread(bad: float) -> None:
    with pytest.raises(TurnTableError, match="finite"):
        discounted_returns(np.array([1.0, bad, 0.0]), np.array([False, False, True]), 0.9)


@pytest.mark.parametrize("gamma", [1.0, -0.1, math.nan])
def test_a_gamma_outside_its_range_is_refused(gamma: float) -> None:
    one, last = np.zeros(2), np.array([False, True])
    for targets in (
        lambda: lambda_returns(one, last, one, gamma, 0.5),
        lambda: one_step_targets(one, last, one, gamma),
        lambda: retrace_targets(one, last, one, one, one, gamma, 0.5),
    ):
        with pytest.raises(ConfigError, match="gamma is"):
            targets()


# --- the chain -------------------------------------------------------------------------------------------------------

BEHAVIOUR = np.random.default_rng(7).dirichlet(np.full(len(ACTIONS), 3.0), CHAIN.states)
POLICY = 0.7 * greedy(CHAIN.optimal(GAMMA)[1]) + 0.3 * CHAIN.uniform()
"""The policy whose Q is sought; its log is the behaviour's."""
VISITS = (CHAIN.start @ CHAIN.visits(BEHAVIOUR, 1.0))[:, None] * BEHAVIOUR
ON_POLICY = ("monte_carlo", "td_lambda", "sarsa")


def estimator(target: str) -> Estimator:
    """On tables a fit costs nothing, so that each may repeat to its fixed point."""
    steps = {"archer": 400}.get(target, 60)
    loss = "mse" if target == "lstd_q" else "bce"
    config = load_config(overrides={"q.target": target, "q.iterations": steps, "q.ridge": 1e-3, "q.loss": loss}).q
    return estimator_of(config)


def sampled(conversations: int, seed: int) -> dict[str, pd.DataFrame]:
    """Conversations of the behaviour and of the policy."""
    pairs = {"behaviour": BEHAVIOUR, "policy": POLICY}
    return {
        name: to_frame(CHAIN.sample(said, conversations, 1000 * k + seed, name), {"purchase": 1.0}, 0.2)
        for k, (name, said) in enumerate(pairs.items())
    }


def chain_q(target: str, frames: dict[str, pd.DataFrame]) -> np.ndarray:
    """(S, A) Q of the right policy as one estimator has it: of the behaviour where it knows of no other."""
    frame, own, policy = frames["behaviour"], None, BEHAVIOUR if target in ON_POLICY else POLICY
    if target == "one_step":
        frame = pd.concat([frames["policy"], frame], ignore_index=True)
        own = np.arange(len(frame)) < len(frames["policy"])
    table, data = enumerated(frame, CHAIN.state_of, ACTIONS, policy, GAMMA, own)
    estimator(target).fit(table, data)
    return table.q


def distance(q: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square over the behaviour's visits."""
    return float(np.sqrt((VISITS * (q - exact) ** 2).sum() / VISITS.sum()))


@pytest.fixture(scope="module")
def frames() -> dict[str, pd.DataFrame]:
    return sampled(5000, seed=0)


@pytest.mark.parametrize("target", TARGETS)
def test_each_estimator_finds_the_exact_q_of_the_right_policy(target: str, frames: dict[str, pd.DataFrame]) -> None:
    right, wrong = CHAIN.q_pi(BEHAVIOUR, GAMMA), CHAIN.q_pi(POLICY, GAMMA)
    if target not in ON_POLICY:
        right, wrong = wrong, right
    q = chain_q(target, frames)
    assert distance(right, wrong) > 0.1
    assert distance(q, right) < 0.03
    assert distance(q, wrong) > 0.1


def test_fqe_archer_and_lstd_q_have_one_fixed_point(frames: dict[str, pd.DataFrame]) -> None:
    lstd = chain_q("lstd_q", frames)
    for target in ("fqe", "archer"):
        assert distance(chain_q(target, frames), lstd) < 1e-4
    assert distance(chain_q("retrace", frames), lstd) > 1e-4, "Retrace reads further, so it errs otherwise"


def implicit(frames: dict[str, pd.DataFrame], expectile: float) -> np.ndarray:
    """(S, A) Q of ArCHer's offline form from the behaviour's log."""
    table, data = enumerated(frames["behaviour"], CHAIN.state_of, ACTIONS, POLICY, GAMMA)
    overrides = {"q.target": "archer", "q.iterations": 400, "q.expectile": expectile}
    estimator_of(load_config(overrides=overrides).q).fit(table, data)
    return table.q


def test_implicit_q_learning_at_a_half_is_the_behaviours_q_and_above_it_what_its_expectiles_say(
    frames: dict[str, pd.DataFrame],
) -> None:
    """Whatever the policy: it looks at the logged actions alone. The referee writes Q = r + gamma P V out."""
    assert distance(implicit(frames, 0.5), CHAIN.q_pi(BEHAVIOUR, GAMMA)) < 0.03

    def slope(v: float, q: np.ndarray, said: np.ndarray) -> float:
        return float(said @ (np.where(q > v, 0.9, 0.1) * (q - v)))

    v = np.zeros(CHAIN.states)
    for _ in range(60):
        q = CHAIN.reward + GAMMA * CHAIN.transition @ v
        v = np.array([optimize.brentq(slope, -9, 9, args=pair) for pair in zip(q, BEHAVIOUR, strict=True)])
    assert distance(implicit(frames, 0.9), q) < 0.03
    assert distance(q, CHAIN.q_pi(BEHAVIOUR, GAMMA)) > 0.1


@light
@example([1.0, -1.0], 1)  # whose mean is what a table begins with
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=3), st.integers(1, 40))
def test_the_expectile_of_a_state_is_found_however_few_or_equal_its_values(values: list[float], repeats: int) -> None:
    q = np.array(values * repeats)
    last = np.tile([False, True], len(q))
    table, rows = Table(np.ones((1, 1)), np.where(last, -1, 0), np.where(last, -1, 0)), np.where(last, np.nan, 0.0)
    rows[~last] = q
    table.fit(rows[:, None], expectile=0.9)
    slope = np.where(q > table.v[0], 0.9, 0.1) * (q - table.v[0])
    assert slope.sum() == pytest.approx(0.0, abs=1e-9 * len(q))


@pytest.mark.parametrize("loss", ["bce", "mse"])
def test_a_networks_v_learns_the_expectile_of_its_targets_and_q_their_mean(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], loss: str
) -> None:
    """Targets of V are 1 or 0 by the toss of a coin, whose .9 expectile is about .9; those of Q are .3."""
    long = {"q.value_epochs": 60.0, "q.value_learning_rate": 0.01, "q.running_weight": 0.0}
    config = small(**{"q.target": "archer", "q.loss": loss, **long})
    data = a_round(tiny_policy, scripted[:20], config)
    coin = np.random.default_rng(0).integers(2, size=len(data.last)).astype(float)[:, None]
    found = {}
    for expectile in (None, 0.5, 0.9):
        q = QModel.from_policy(tiny_policy, QSettings.of(config), 0)
        for weight in backbone(q.model).parameters():  # which could learn the tosses by heart
            weight.requires_grad_(False)
        network = Network(q, Log(tiny_policy, [data.encoded], config.q, 0))
        network.fit(np.full_like(coin, 0.3), coin, schedule="value", expectile=expectile)
        found[expectile] = network.values()
    ones = coin[~data.last].mean()
    assert np.nanmean(found[0.9].v) == pytest.approx(0.9 * ones / (0.9 * ones + 0.1 * (1 - ones)), abs=0.03)
    assert np.nanmean(found[None].v) == pytest.approx(ones, abs=0.03)
    assert np.allclose(found[None].v, found[0.5].v, equal_nan=True)
    assert all(np.nanmean(values.q) == pytest.approx(0.3, abs=0.05) for values in found.values())


@pytest.mark.parametrize("wrong", [{"q.target": "fqe"}, {"q.target": "archer", "q.loss": "hl_gauss"}])
def test_an_expectile_is_archers_alone(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="expectile is archer's, under loss bce or mse"):
        load_config(overrides={"q.expectile": 0.9, **wrong})


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_the_error_falls_as_one_over_the_root_of_n(target: str) -> None:
    exact = CHAIN.q_pi(BEHAVIOUR if target in ON_POLICY else POLICY, GAMMA)
    sizes = (500, 2000, 8000)
    errors = [[distance(chain_q(target, sampled(n, seed)), exact) for seed in range(8)] for n in sizes]
    slope = np.polyfit(np.log(sizes), np.log(np.sqrt(np.mean(np.square(errors), axis=1))), 1)[0]
    assert -0.62 < slope < -0.38, errors


def test_rows_without_an_action_or_held_out_teach_a_table_nothing(frames: dict[str, pd.DataFrame]) -> None:
    """One conversation in three has no logged actions, one in three is held out: as if neither were there."""
    frame = frames["behaviour"].iloc[:3000]
    third = pd.factorize(frame["conversation_id"])[0] % 3
    table, data = enumerated(frame, CHAIN.state_of, ACTIONS, POLICY, GAMMA)
    table.action[third == 1] = -1
    data = replace(data, fit=third != 2, logged=data.logged & (third != 1))
    rest, clean = enumerated(frame[third == 0].reset_index(drop=True), CHAIN.state_of, ACTIONS, POLICY, GAMMA)
    for target in TARGETS:
        one, other = table.copy(), rest.copy()
        estimator(target).fit(one, data)
        estimator(target).fit(other, clean)
        assert np.allclose(one.q, other.q, atol=1e-8), target


def test_others_conversations_never_enter_on_policy_estimators(frames: dict[str, pd.DataFrame]) -> None:
    frame = frames["behaviour"].iloc[:2000]
    table, data = enumerated(frame, CHAIN.state_of, ACTIONS, POLICY, GAMMA)
    own = np.arange(len(frame)) <= np.flatnonzero(data.last)[150]
    data = replace(data, own=own)
    forged = replace(data, **{name: np.where(own[:, None], getattr(data, name), 9) for name in ("returns", "reward")})
    for target in TARGETS:
        one, other = table.copy(), table.copy()
        estimator(target).fit(one, data)
        estimator(target).fit(other, forged)
        assert np.allclose(one.q, other.q) == (target in ON_POLICY), target


def without(frame: pd.DataFrame, gone: np.ndarray) -> pd.DataFrame:
    """A turn table whose suggestions in (N,) some rows were not logged."""
    gone = gone & turn_table.actions(frame)
    frame = frame.copy()
    frame.loc[gone, ["suggestion", "suggestion_status", "behaviour_logprob"]] = [None, "missing", None]
    return frame


@pytest.mark.parametrize("target", TARGETS)
def test_targets_go_on_over_what_was_not_logged(target: str, frames: dict[str, pd.DataFrame]) -> None:
    """Only first suggestions are logged: nothing is learnt of the states after them, which must not be asked."""
    frame = without(frames["policy"], (frames["policy"]["turn"] > 1).to_numpy())
    table, data = enumerated(frame, CHAIN.state_of, ACTIONS, POLICY, GAMMA)
    estimator(target).fit(table, data)
    first = CHAIN.start > 0
    exact = CHAIN.q_pi(POLICY, GAMMA)
    assert np.abs(table.q[first] - exact[first]).max() < 0.06


@pytest.mark.parametrize("target", ["fqe", "retrace", "lstd_q", "archer"])
def test_where_nothing_was_logged_the_business_acts_for_the_policy_too(
    target: str, frames: dict[str, pd.DataFrame]
) -> None:
    """In half of the states it does as the behaviour: Q is that of the policy and of it by turns."""
    half = np.random.default_rng(0).random(len(frames["behaviour"])) < 0.5
    table, data = enumerated(without(frames["behaviour"], half), CHAIN.state_of, ACTIONS, POLICY, GAMMA)
    estimator(target).fit(table, data)
    right, wrong = (CHAIN.q_pi(policy, GAMMA) for policy in ((POLICY + BEHAVIOUR) / 2, POLICY))
    assert distance(table.q, right) < 0.03
    assert distance(table.q, wrong) > 0.06


# --- what is refused, and what is reported ---------------------------------------------------------------------------


def chain_data(**changes: Any) -> Transitions:
    frame = to_frame(CHAIN.sample(BEHAVIOUR, 300, 5), {"purchase": 1.0}, 0.2)
    _, data = enumerated(frame, CHAIN.state_of, ACTIONS, POLICY, GAMMA)
    return replace(data, **changes)


def test_rows_without_a_behaviour_logprob_are_counted_and_all_missing_is_refused() -> None:
    data = chain_data()
    some = replace(data, log_ratio=np.where(np.arange(len(data.last)) % 4 == 0, np.nan, data.log_ratio))
    for target in ("retrace", "fqe"):
        report = checked(some, estimator(target), 10.0, [1.0])
        assert report["fit_turns_without_logprob"] == (data.logged & (np.arange(len(data.last)) % 4 == 0)).sum()
        assert report["fit_turns"] == data.logged.sum()
    none = replace(data, log_ratio=np.full(len(data.last), np.nan))
    with pytest.raises(TrainingError, match=rf"none of {data.logged.sum()} logged suggestions has a behaviour_logprob"):
        checked(none, estimator("retrace"), 10.0, [1.0])
    assert "fit_effective_size" not in checked(none, estimator("fqe"), 10.0, [1.0]), "FQE needs none, and knows none"


def test_the_effective_size_is_kishs_and_too_small_a_one_is_refused_with_the_figure() -> None:
    assert effective_size(np.zeros(50)) == pytest.approx(50)
    assert effective_size(np.log([3.0, 1.0])) == pytest.approx(16 / 10)
    assert effective_size(np.array([1e4, 1e4, -1e4, np.nan])) == pytest.approx(2)
    assert effective_size(np.full(3, np.nan)) == effective_size(np.full(3, -np.inf)) == 0
    assert effective_size(np.array([0.0, 0.0, -np.inf, np.nan])) == pytest.approx(2)
    data = chain_data()
    size = checked(data, estimator("fqe"), 10.0, [1.0])["fit_effective_size"]
    assert 100 < size < data.logged.sum()
    for target in ("fqe", "retrace", "lstd_q", "archer"):
        with pytest.raises(
            TrainingError, match=rf"worth {size:.1f} of the policy's own .* q.effective_size_floor = 5000"
        ):
            checked(data, estimator(target), 5000.0, [1.0])
    for target in (*ON_POLICY, "one_step"):
        assert "fit_effective_size" not in checked(data, estimator(target), 5000.0, [1.0])


def test_a_few_known_ratios_are_no_evidence_against_the_rest() -> None:
    data = chain_data()
    own = replace(data, log_ratio=np.zeros(len(data.last)))
    few = replace(own, log_ratio=np.where(np.cumsum(data.logged) <= 40, 0.0, np.nan))
    assert checked(few, estimator("fqe"), 100.0, [1.0])["fit_effective_size"] == pytest.approx(40, abs=1)
    with pytest.raises(TrainingError, match=r"40\.0 of the policy's own"):
        checked(few, estimator("retrace"), 100.0, [1.0])


def test_a_log_of_nothing_that_the_policy_says_is_refused_and_not_taken_for_one_without_logprobs() -> None:
    data = chain_data()
    for target in ("fqe", "retrace", "lstd_q", "archer"):
        with pytest.raises(TrainingError, match=rf"{data.logged.sum()} logged suggestions are worth 0.0 of the policy"):
            checked(replace(data, log_ratio=np.where(data.logged, -np.inf, np.nan)), estimator(target), 1.0, [1.0])


@pytest.mark.parametrize("target", TARGETS)
def test_conversations_longer_than_there_are_iterations_are_counted(target: str) -> None:
    data = chain_data()
    turns = np.bincount(np.cumsum(data.last) - data.last) - 1
    usual = int(np.median(turns))
    loss = "mse" if target == "lstd_q" else "bce"
    bootstraps = estimator_of(load_config(overrides={"q.target": target, "q.iterations": usual, "q.loss": loss}).q)
    report = checked(data, bootstraps, 10.0, [1.0])
    if target in ("monte_carlo", "one_step", "lstd_q"):
        assert "fit_share_beyond_iterations" not in report
    else:
        assert 0 < report["fit_share_beyond_iterations"] == (turns > usual).mean() < 0.5
        assert report["fit_longest_conversation"] == turns.max()


@pytest.mark.parametrize("target", TARGETS)
def test_a_log_with_nothing_to_fit_is_refused(target: str) -> None:
    data = chain_data()
    for nothing in (replace(data, fit=~data.logged), replace(data, logged=0 * data.logged > 0)):
        with pytest.raises(
            TrainingError, match=rf"none of {nothing.logged.sum()} logged suggestions is in the fit part"
        ):
            checked(nothing, estimator(target), 1.0, [1.0])
    others = replace(data, own=~data.logged)
    if target in (*ON_POLICY, "one_step"):
        with pytest.raises(TrainingError, match="in the fit part of the policy's own: Q has nothing to be fitted to"):
            checked(others, estimator(target), 1.0, [1.0])


@pytest.mark.parametrize("target", TARGETS)
def test_outcomes_that_are_all_equal_are_refused(target: str) -> None:
    data = chain_data()
    flat = replace(data, reward=0 * data.reward, returns=0 * data.returns)
    with pytest.raises(TrainingError, match="all 300 conversations' outcomes are 0: no outcome differs"):
        checked(flat, estimator(target), 1.0, [1.0])
    held = replace(data, fit=data.returns.max(axis=1) == 0)
    with pytest.raises(TrainingError, match="no outcome differs"):
        checked(held, estimator(target), 1.0, [1.0])
    both = replace(data, reward=np.concatenate([data.reward, 0 * data.reward], axis=1))
    assert checked(both, estimator(target), 1.0, [1.0, 0.5])["fit_constant_outcomes"] == 1, "one of two: reported"


def test_outcomes_whose_weighted_sum_never_differs_are_refused() -> None:
    data = chain_data()
    lost = np.append(data.last[1:], False)[:, None] - data.reward
    both = replace(data, reward=np.tile(np.concatenate([data.reward, lost], axis=1), (1, 2)))
    for target in TARGETS:
        assert checked(both, estimator(target), 1.0, [1.0, 0.5])["fit_constant_outcomes"] == 0
        for weights, total in (([1.0, 1.0], 1), ([0.0, 0.0], 0)):
            with pytest.raises(
                NothingToLearn, match=rf"all 300 conversations' outcomes come to R = {total}, .*weights"
            ):
                checked(both, estimator(target), 1.0, weights)
    one = replace(data, reward=np.concatenate([0 * data.reward, data.reward], axis=1))
    with pytest.raises(NothingToLearn, match="R = 0"):
        checked(one, estimator("one_step"), 1.0, [1.0, 0.0])


def test_successes_that_differ_by_length_alone_are_refused_and_turns_paid_by_themselves_are_not() -> None:
    data = chain_data()
    reward = np.append(data.last[1:], False).astype(float)[:, None]
    won = replace(data, reward=reward, returns=discounted_returns(reward, data.last, GAMMA))
    assert np.ptp(won.returns[won.logged]) > 0.1
    for target in TARGETS:
        with pytest.raises(TrainingError, match="all 300 conversations' outcomes are 1: no outcome differs"):
            checked(won, estimator(target), 1.0, [1.0])
    assert checked(won, estimator("monte_carlo"), 1.0, [1.0], by_turn=True)["fit_constant_outcomes"] == 0
    alike = replace(won, returns=np.full_like(won.returns, 0.5))
    with pytest.raises(TrainingError, match=rf"all {won.logged.sum()} returns of turns are 0.5"):
        checked(alike, estimator("monte_carlo"), 1.0, [1.0], by_turn=True)


# --- networks --------------------------------------------------------------------------------------------------------


def small(**changes: Any) -> Config:
    """A config whose fits are short."""
    base = {"q.epochs": 0.5, "q.value_epochs": 0.5, "q.iterations": 2, "q.samples": 2, "q.effective_size_floor": 5.0}
    if changes.get("q.target") == "lstd_q":
        base["q.loss"] = "mse"  # type: ignore[assignment]
    return load_config(overrides={**base, **changes})


def a_round(policy: LanguagePolicy, talks: list[Conversation], config: Config) -> Round:
    """Scripted conversations, logged as if the script had been about as sure of itself as the policy."""
    data = round_of(policy, to_frame(talks, {"purchase": 1.0}, 0.3), config)
    return replace(data, behaviour=policy.score(data.encoded) - 0.1)


def staff_takes_over(talks: list[Conversation]) -> list[Conversation]:
    """The same conversations, in which nothing was suggested in the second turn and the third."""

    def told(number: int, turn: Turn) -> Turn:
        taken = number in (1, 2) and not turn.terminal
        return replace(turn, suggestion=MISSING, adoption=None) if taken else turn

    return [replace(talk, turns=tuple(told(*pair) for pair in enumerate(talk.turns))) for talk in talks]


def same(one: QModel, other: QModel) -> bool:
    mine, theirs = one.model.state_dict(), other.model.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.mark.parametrize("target", TARGETS)
def test_every_estimator_fits_a_network_and_sees_no_held_out_outcome(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], target: str
) -> None:
    config = small(**{"q.target": target})
    data = a_round(tiny_policy, scripted[:12], config)
    forged = replace(
        data,
        reward=np.where(data.fit, data.reward, 1 - data.reward),
        returns=np.where(data.fit, data.returns, 1 - data.returns),
    )
    q = fit_q(tiny_policy, data, [], config)
    values = q.evaluate(data.encoded)
    logged = np.isfinite(values.q)
    assert logged.sum() > 30 and np.isfinite(values.v[logged]).all()
    assert same(fit_q(tiny_policy, forged, [], config), q)
    changed = replace(data, reward=1 - data.reward, returns=1 - data.returns)
    assert not same(fit_q(tiny_policy, changed, [], config), q)
    assert q.report["fit_turns"] == (logged & data.fit).sum()


@pytest.mark.parametrize("target", TARGETS)
def test_other_policies_turns_enter_where_the_estimator_may_use_them(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], target: str
) -> None:
    config = small(**{"q.target": target})
    data, other = (a_round(tiny_policy, talks, config) for talks in (scripted[:10], scripted[10:16]))
    alone, both = fit_q(tiny_policy, data, [], config), fit_q(tiny_policy, data, [other], config)
    assert same(alone, both) == (target in ON_POLICY)


def test_a_logprob_that_is_none_is_refused_by_row(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    config = small(**{"q.target": "retrace"})
    data = a_round(tiny_policy, scripted[:5], config)
    assert data.behaviour is not None
    for value in (0.3, -math.inf):
        wrong = data.behaviour.copy()
        wrong[2] = value
        said = rf"row 2: behaviour_logprob is {value:g}, expected finite and at most 0 \(1 such rows\)"
        with pytest.raises(TurnTableError, match=said):
            fit_q(tiny_policy, replace(data, behaviour=wrong), [], config)
    with pytest.raises(TrainingError, match=r"has a behaviour_logprob, which q\.target retrace needs"):
        fit_q(tiny_policy, replace(data, behaviour=None), [], config)


@pytest.mark.parametrize("target", TARGETS)
def test_a_fit_from_a_file_by_blocks_is_the_fit_from_memory(
    target: str, tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path
) -> None:
    """Rows are read some conversations at a time, and tokens lie on disk."""
    config = small(**{"q.target": target})
    behaviour = a_round(tiny_policy, scripted[:24], config).behaviour
    frame = to_frame(scripted[:24], {"purchase": 1.0}, 0.3)
    frame["behaviour_logprob"] = pd.array(behaviour, dtype="Float64")
    turn_table.write(frame, tmp_path / "turns.parquet", {"purchase": 1.0})
    blocks = [turn_table.blocks(tmp_path / "turns.parquet", {"purchase": 1.0}, rows=11) for _ in range(2)]
    assert len(list(blocks.pop())) > 5
    place = tmp_path / "tokens"
    place.mkdir()
    streamed = round_from(tiny_policy, blocks.pop(), config, place / "own")
    whole = round_of(tiny_policy, turn_table.read(tmp_path / "turns.parquet", {"purchase": 1.0}), config)
    assert isinstance(streamed.encoded.sequences, SequenceFile)
    assert list(streamed.encoded.sequences) == whole.encoded.sequences
    assert np.array_equal(streamed.returns, whole.returns)
    assert np.array_equal(streamed.fit, whole.fit)
    other = round_from(tiny_policy, [to_frame(scripted[24:30], {"purchase": 1.0}, 0.3)], config, place / "other")
    beside = round_of(tiny_policy, to_frame(scripted[24:30], {"purchase": 1.0}, 0.3), config)
    one, two = fit_q(tiny_policy, streamed, [other], config), fit_q(tiny_policy, whole, [beside], config)
    assert same(one, two)
    assert one.report == two.report


def test_lstd_q_needs_a_linear_value() -> None:
    with pytest.raises(ConfigError, match=r"set q\.loss to mse"):
        load_config(overrides={"q.target": "lstd_q"})


def test_the_expected_q_is_the_mean_over_the_policys_responses(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the states are cut into pieces; and it is not the value of what was logged."""
    config = small()
    data = a_round(tiny_policy, scripted[:6], config)
    q = QModel.from_policy(tiny_policy, QSettings.of(config), 0)
    log = Log(tiny_policy, [data.encoded], config.q, 3)
    found = Network(q, log).expected()
    assert np.isnan(found[:, 0]).tolist() == data.last.tolist()
    rows, prompts = log.states[:, 0], log.prompts(log.states)
    for k in (0, len(rows) - 1):
        sequences = [prompts[k] + log.responses[2 * k + m].tokens for m in range(2)]
        with torch.no_grad():
            ends = [torch.sigmoid(q.head(last_hidden(q.model, torch.tensor([s]))))[0, -1].item() for s in sequences]
        assert found[rows[k], 0] == pytest.approx(np.mean(ends), abs=1e-5)
    monkeypatch.setattr("iterative_ppo.learning.estimators.network.SAMPLED_STATES", 3)
    assert np.allclose(Network(q, log).expected(), found, atol=1e-5, equal_nan=True)
    assert not np.allclose(found, q.evaluate(data.encoded).q[:, None], equal_nan=True)


def test_a_network_has_no_value_where_nothing_was_logged_and_samples_no_response_there(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small()
    data = a_round(tiny_policy, staff_takes_over(scripted[:6]), config)
    q = QModel.from_policy(tiny_policy, QSettings.of(config), 0)
    log, asked = Log(tiny_policy, [data.encoded], config.q, 0), list[int]()
    respond = LanguagePolicy.respond
    monkeypatch.setattr(LanguagePolicy, "respond", lambda *a, **k: asked.append(len(a[1])) or respond(*a, **k))
    learner, logged = Network(q, log), logged_rows(data.encoded)
    for found in (learner.expected(), learner.values().v, learner.values().q):
        assert np.array_equal(np.isfinite(found[:, 0]), logged)
    assert 0 < sum(asked) == logged.sum() < (~data.last).sum()


@pytest.mark.parametrize("takes_over", [False, True])
def test_lstd_q_of_a_network_is_the_fixed_point_on_its_features(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], takes_over: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual of the projected Bellman equation is the ridge's: sum phi (r + gamma Q' - Q) = k w."""
    monkeypatch.setattr("iterative_ppo.learning.estimators.lstd_q.ROWS", 7)  # whose ends lie among missing rows
    config = small(**{"q.target": "lstd_q", "q.running_weight": 0.0})
    talks = scripted[:20]
    data = a_round(tiny_policy, staff_takes_over(talks) if takes_over else talks, config)
    q = fit_q(tiny_policy, data, [], config)
    learner = Network(q, Log(tiny_policy, [data.encoded], config.q, config.seed))
    phi, values, v = learner.features().logged, learner.values(), learner.expected()
    rows = data.fit & np.isfinite(values.q[:, 0])
    target = one_step_targets(data.reward[:, None], data.last, v, GAMMA)
    residual = phi[rows].T @ (target - values.q)[rows, 0]
    v_weights, q_weights = (np.append(q.head.weight[k].detach(), q.head.bias[k].item()) for k in (0, 1))
    assert np.allclose(residual, config.q.ridge * q_weights, atol=2e-3)
    prompts = np.zeros_like(phi)
    for batch, hidden in learner._hidden(data.encoded):
        prompts[batch.row] = hidden[batch.sequence, batch.start - 1]
    states = logged_rows(data.encoded)
    residual = prompts[states].T @ (v - values.v)[states, 0]
    assert np.allclose(residual, config.q.ridge * v_weights, atol=2e-3), "V's heads are fitted to E_pi Q"


def test_a_target_network_follows_by_its_share_of_the_way(tiny_policy: LanguagePolicy) -> None:
    slow, fast = (QModel.from_policy(tiny_policy, QSettings("bce", 0.0, 1.0, GAMMA), seed) for seed in (0, 1))
    before = slow.head.weight.detach().clone()
    slow.follow(fast, 0.25)
    assert torch.allclose(slow.head.weight, 0.75 * before + 0.25 * fast.head.weight)


def test_archers_target_network_lags_behind_its_critic(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts as the critic's copy, moves with every step, and gives the targets of the next fit."""
    config = small(**{"q.target": "archer", "q.polyak": 0.1})
    data, told = a_round(tiny_policy, scripted[:20], config), []
    fit = Network.fit

    def spied(self: Network, q: np.ndarray, v: Any = None, *args: Any, target: Any = None, **named: Any) -> None:
        before = None if target is None else target.copy()
        fit(self, q, v, *args, target=target, **named)
        if before is not None:
            assert np.allclose(v, before.expected(), equal_nan=True)
            ahead = one_step_targets(data.reward[:, None], data.last, before.values().v, GAMMA)
            assert np.allclose(q[data.fit], ahead[data.fit], atol=1e-6)
            told.append([float((x.q.head.weight - before.q.head.weight).detach().norm()) for x in (target, self)])

    monkeypatch.setattr(Network, "fit", spied)
    fit_q(tiny_policy, data, [], config)
    assert len(told) == 2 and 0 < told[0][0] < told[0][1]


def test_implicit_q_learning_samples_no_response_and_asks_for_no_support(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(**{"q.target": "archer", "q.expectile": 0.9, "q.effective_size_floor": 1e9})
    data = a_round(tiny_policy, scripted[:20], config)
    monkeypatch.setattr(LanguagePolicy, "respond", None)
    q = fit_q(tiny_policy, data, [], config)
    assert np.isfinite(q.evaluate(data.encoded).q[data.fit & ~data.last]).all()
    assert "fit_effective_size" not in q.report


@pytest.mark.parametrize("target", ["one_step", "td_lambda", "fqe", "archer"])
@pytest.mark.parametrize("stopped", [2, 5, 7])
def test_a_killed_fit_ends_with_the_same_weights(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path, target: str, stopped: int
) -> None:
    """Within its first regression or a later one, of the same network or another; those before are not made again."""
    changes = {"q.epochs": 2.0, "q.value_epochs": 2.0, "q.value_batch_size": 10, "q.batch_size": 10}
    config, told = small(**{"q.target": target, **changes}), list[tuple[int, int]]()
    data = a_round(tiny_policy, scripted[:20], config)

    def fitted(place: Path | None) -> QModel:
        kept = place and Checkpoint(place / "q", "key", 1)
        return fit_q(tiny_policy, data, [], config, None, lambda *step: told.append(step), kept)

    whole = fitted(None)
    updates, fits = len(told), [k for k, (done, _) in enumerate(told) if done == 1]
    assert len(fits) == (2 if target == "one_step" else 3) and fits[1] <= 4 < updates

    def killed(*step: int) -> None:
        told.append((step[0], step[1]))
        if len(told) == stopped:
            raise KeyboardInterrupt

    told.clear()
    with pytest.raises(KeyboardInterrupt):
        fit_q(tiny_policy, data, [], config, None, killed, Checkpoint(tmp_path / "q", "key", 1))
    told.clear()
    looks, look = [], Log.mean_of_samples
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Log, "mean_of_samples", lambda *asked: looks.append(1) or look(*asked))
        again = fitted(tmp_path)
    assert len(told) == updates - stopped and same(again, whole) and again.report == whole.report
    begun = sum(first < stopped for first in fits)
    assert len(looks) == (2 - max(0, begun - 2) if target in ("fqe", "archer") else 0)
    assert len(list(tmp_path.iterdir())) == (2 if target == "one_step" else 1), "one kept fit a network"


# --- calibration -----------------------------------------------------------------------------------------------------


def overconfident(conversations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(predicted, observed, group): the log odds of the outcome are half of what is predicted."""
    rng = np.random.default_rng(0)
    logit = rng.normal(-1.0, 1.0, conversations)
    group = np.repeat(np.arange(conversations), 3)
    won = (rng.random(conversations) < 1 / (1 + np.exp(-logit))).astype(float)
    return 1 / (1 + np.exp(-2 * logit))[group], won[group], group


@pytest.mark.parametrize("method", ["isotonic", "temperature"])
def test_recalibration_mends_overconfidence_on_conversations_it_has_not_seen(method: Any) -> None:
    predicted, observed, group = overconfident(1500)
    raw = calibration(predicted, observed, group)
    mended = calibration(recalibrated(predicted, observed, group, method), observed, group)
    assert raw.error > 2 * raw.chance_95
    assert mended.error < min(0.4 * raw.error, 1.3 * mended.chance_95)
    mapped = calibrator(predicted, observed, method)(np.linspace(0, 1, 50))
    assert (np.diff(mapped) >= 0).all() and mapped.min() >= 0 and mapped.max() <= 1


@pytest.mark.parametrize("method", ["isotonic", "temperature"])
def test_a_conversations_own_outcome_never_reaches_its_calibration(method: Any) -> None:
    predicted, observed, group = overconfident(60)
    mapped = recalibrated(predicted, observed, group, method)
    for talk in range(0, 60, 7):
        forged = np.where(group == talk, 1 - observed, observed)
        again = recalibrated(predicted, forged, group, method)
        assert np.array_equal(again[group == talk], mapped[group == talk])
        assert not np.array_equal(again, mapped)


def test_the_temperature_is_the_one_that_was_put_in_also_from_shares() -> None:
    """Outcomes between 0 and 1 count as that share of a success."""
    logit = np.linspace(-4, 4, 200)
    share = 1 / (1 + np.exp(-logit / 2))
    mapped = calibrator(1 / (1 + np.exp(-logit)), share, "temperature")
    assert np.allclose(mapped(np.array([1 / (1 + math.exp(-3.0))])), 1 / (1 + math.exp(-1.5)), atol=1e-3)


def test_one_class_or_too_few_conversations_are_no_calibration() -> None:
    predicted, observed, group = overconfident(60)
    with pytest.raises(TrainingError, match=r"all \d+ held-out outcomes are 0: calibration needs successes"):
        recalibrated(predicted, 0 * observed, group, "isotonic")
    with pytest.raises(TrainingError, match="3 held-out conversations, calibration needs at least 5"):
        recalibrated(predicted[:9], observed[:9], group[:9], "temperature")
