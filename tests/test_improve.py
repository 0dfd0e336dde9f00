"""SingleTurnOpt: the formulas longhand, a bandit whose optimum is known, and what must not be trained on."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bandit import WORDS, ByPrompt, Taste, build_bandit, distance, leans_to, likes, probability, prompt, said
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from iterative_ppo.config import BestOfNConfig, Config, LoggedConfig, PPOConfig, load_config
from iterative_ppo.errors import ConfigError, ModelError, NothingToLearn, StoreError, TrainingError
from iterative_ppo.learning import rounds
from iterative_ppo.learning.batching import Batch, EncodedTable, collate
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.compare import speak
from iterative_ppo.learning.improve import best_of_n
from iterative_ppo.learning.improve.best_of_n import best, improve_by_best
from iterative_ppo.learning.improve.critic import LearnedCritic
from iterative_ppo.learning.improve.episodes import (
    gae,
    kl_both_ways,
    prompts_of,
    response_rewards,
    roll_out,
    token_log_probs,
)
from iterative_ppo.learning.improve.logged import LoggedData, improve_on_log, logged_objective, turn_advantages
from iterative_ppo.learning.improve.ppo import _update, adapted, advance, begin, clipped, improve, shown, surrogate
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.optimization import Objective, optimizer_for, take_step
from iterative_ppo.learning.q_model import QModel, QSettings
from iterative_ppo.learning.regression import Regression, regress
from iterative_ppo.learning.rounds import evaluate_policy, improve_policy, round_of
from iterative_ppo.learning.sequences import Beginnings
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.rendering import Encoded, single
from iterative_ppo.mdp.turn_table import actions, to_frame

torch.set_num_threads(1)

OUTCOMES = {"purchase": 1.0}
SHARE = st.floats(0, 1)
light = settings(deadline=None, max_examples=60)


def series(length: int) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(float, length, elements=st.floats(-5, 5))


# --- advantages ------------------------------------------------------------------------------------------------------


@light
@given(data=st.data(), length=st.integers(1, 8), lam=SHARE)
def test_gae_is_the_double_sum_with_gamma_1_and_nothing_after_the_end(
    data: st.DataObject, length: int, lam: float
) -> None:
    reward, value = data.draw(series(length)), data.draw(series(length))
    after = [*value[1:], 0.0]
    delta = [reward[t] + after[t] - value[t] for t in range(length)]
    expected = [sum(lam ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
    assert gae(reward, value, lam) == pytest.approx(expected, abs=1e-6)


@light
@given(data=st.data(), length=st.integers(1, 8))
def test_gae_with_lambda_1_is_the_return_less_the_value(data: st.DataObject, length: int) -> None:
    reward, value = data.draw(series(length)), data.draw(series(length))
    to_go = [reward[t:].sum() for t in range(length)]
    assert gae(reward, value, 1.0) == pytest.approx(np.array(to_go) - value, abs=1e-6)


@light
@given(data=st.data(), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=4), gamma=st.floats(0, 0.99), lam=SHARE)
def test_turn_advantages_are_the_double_sum_within_each_conversation(
    data: st.DataObject, lengths: list[int], gamma: float, lam: float
) -> None:
    """Each conversation has `length` actions, then a terminal row whose V is NaN and whose advantage is 0."""
    rewards, values, expected = [], [], []
    for length in lengths:
        r, v = data.draw(series(length)), data.draw(series(length))
        delta = r + gamma * np.append(v[1:], 0.0) - v
        expected += [sum((gamma * lam) ** (k - i) * delta[k] for k in range(i, length)) for i in range(length)] + [0.0]
        rewards += [*r, 0.0]
        values += [*v, math.nan]
    last = np.isnan(values)
    advantage = turn_advantages(np.array(rewards), last, np.array(values), gamma, lam)
    assert advantage == pytest.approx(np.array(expected), abs=1e-6)


@light
@given(data=st.data(), gamma=st.floats(0, 0.99), lam=SHARE)
def test_turn_advantages_go_on_over_what_was_not_logged(data: st.DataObject, gamma: float, lam: float) -> None:
    """An action, two turns without one, an action: the first delta reaches over the two to the V of the last."""
    r, v = data.draw(series(4)), data.draw(series(4))
    later = r[3] - v[3]
    delta = r[0] + gamma * r[1] + gamma**2 * r[2] + gamma**3 * v[3] - v[0]
    v[1:3] = math.nan
    advantage = turn_advantages(np.append(r, 0.0), np.arange(5) == 4, np.append(v, math.nan), gamma, lam)
    assert advantage == pytest.approx(np.array([delta + gamma**3 * lam * later, 0.0, 0.0, later, 0.0]), abs=1e-6)


# --- losses ----------------------------------------------------------------------------------------------------------

# ratio, advantage, clip .2 -> min(ratio A, clip(ratio) A), and whether the gradient passes
CLIPPING = [
    (1.0, 1.0, 1.0, True),
    (1.5, 1.0, 1.2, False),
    (0.5, 1.0, 0.5, True),
    (1.5, -1.0, -1.5, True),
    (0.5, -1.0, -0.8, False),
    (1.1, -2.0, -2.2, True),
    (1.5, 0.0, 0.0, False),
]


def of_tokens(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return surrogate(*given), clipped(given[0], given[1], given[3])


@pytest.mark.parametrize("objective", [of_tokens, logged_objective])
def test_the_clipped_surrogate_longhand(objective: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    ratio, advantage, expected, passes = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*CLIPPING, strict=True)
    )
    old = torch.linspace(-3, -1, len(ratio), dtype=torch.float64)
    log_p = (old + ratio.log()).requires_grad_()
    value, outside = objective(log_p, old, advantage, 0.2)
    assert value.tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert outside.tolist() == ((ratio - 1).abs() > 0.2).double().tolist()
    value.sum().backward()
    slope = ratio * advantage * passes
    assert log_p.grad is not None
    assert log_p.grad.tolist() == pytest.approx(slope.tolist(), abs=1e-9)


def test_a_hopeless_ratio_gives_a_finite_loss() -> None:
    """Replayed by another policy, a whole response can be e^200 times as likely."""
    old, new = torch.tensor([-200.0, -1.0]), torch.tensor([0.0, -400.0])
    value, _ = logged_objective(new, old, torch.tensor([-1.0, -1.0]), 0.5)
    assert torch.isfinite(value).all()


def test_a_response_without_an_end_pays_the_penalty_and_gets_q_of_what_it_wrote() -> None:
    values = [np.array([0.3, 0.5, 0.8]), np.array([0.3, 0.6])]
    reward = response_rewards(values, np.array([True, False]), scale=2.0, missing_eos_penalty=0.25)
    assert reward.tolist() == pytest.approx([0.4, 0.3 - 0.25])


# --- a bandit --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bandit(tiny_config: Config) -> LanguagePolicy:
    """Leave its weights alone."""
    return build_bandit(tiny_config)


def ppo(**changes: Any) -> PPOConfig:
    quick = {"episodes": 1280, "epochs": 3, "minibatch_size": 32, "learning_rate": 0.02, "kl_coefficient": 0.0}
    return load_config().improve.ppo.model_copy(update=quick | changes)


def trained(policy: LanguagePolicy, config: PPOConfig, seed: int = 0, q: Any = None) -> LanguagePolicy:
    q = q or likes(policy, "maybe")
    return improve(policy, q, [prompt(policy)], config, seed, rollout_size=128)[0]


def parameters(policy: LanguagePolicy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.model.parameters()]


def unchanged(policy: LanguagePolicy, before: list[torch.Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(policy.model.parameters(), before, strict=True))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_finds_the_one_response_that_pays(bandit: LanguagePolicy, seed: int) -> None:
    assert probability(bandit, "maybe") < 0.1
    before = parameters(bandit)
    assert probability(trained(bandit, ppo(), seed), "maybe") > 0.9
    assert unchanged(bandit, before), "the champion keeps serving while the challenger learns"


def test_ppo_finds_the_response_that_a_fitted_q_prefers(bandit: LanguagePolicy) -> None:
    """The critic, too, is the fitted Q's: its running value."""
    texts = [*WORDS, "yes no", "maybe yes"] * 6
    table = EncodedTable(
        [single(k, prompt(bandit), said(bandit, text), True) for k, text in enumerate(texts)], len(texts)
    )
    q = QModel.from_policy(bandit, QSettings("bce", 0.0, 1.0, 0.95), seed=0)
    regress(q, table, np.array([float(text == "later") for text in texts]), Regression(40.0, 0.01, 16, 0.5), seed=0)
    before, after = (
        speak(p, bandit, q, [prompt(bandit)], 300, seed=1).q for p in (bandit, trained(bandit, ppo(), q=q))
    )
    best = q.running_values([single(0, prompt(bandit), said(bandit, "later"), True)])[0][-1]
    assert before.mean() < 0.5 * best
    assert after.mean() > 0.9 * best


def test_the_curve_tells_of_every_rollout(bandit: LanguagePolicy) -> None:
    told: list[tuple[int, int]] = []
    config, q = ppo(episodes=2560, rollout=256), leans_to(bandit, "no")
    _, curve = improve(bandit, q, [prompt(bandit)], config, 0, progress=lambda *k: told.append(k))
    assert told == [(k, 10) for k in range(1, 11)] and len(curve) == 10
    assert curve[0]["kl_to_reference"] == pytest.approx(0.0, abs=1e-6)
    assert curve[0]["q"] < 0.4 and curve[-1]["q"] > 0.8
    assert curve[-1]["entropy"] < curve[0]["entropy"]
    assert curve[-1]["missing_eos"] < 0.1
    assert all(math.isfinite(value) for entry in curve for value in entry.values())


def test_the_curves_q_is_q_and_no_penalty(bandit: LanguagePolicy) -> None:
    """What a reader compares with the gate's E[Q] must not hold the penalty of responses without an end."""
    config = ppo(episodes=256, missing_eos_penalty=50.0)
    _, curve = improve(bandit, likes(bandit, "no"), [prompt(bandit)], config, 0)
    assert curve[0]["missing_eos"] > 0.1
    assert 0.0 <= curve[0]["q"] <= 1.0


def test_a_larger_penalty_keeps_the_policy_nearer_its_reference(bandit: LanguagePolicy) -> None:
    distance = []
    for beta in (0.02, 0.3, 2.0):
        config = ppo(kl_coefficient=beta, missing_eos_penalty=0.0)
        policy = trained(bandit, config)
        spoken = speak(policy, bandit, likes(policy, "maybe"), [prompt(bandit)], 400, seed=1)
        distance.append(spoken.kl)
    assert distance[0] > 1.5 * distance[1] > 2 * distance[2] >= -0.01
    assert distance[2] < 0.15


def test_the_penalty_looks_to_the_reference_that_is_given(bandit: LanguagePolicy) -> None:
    """Pulled to another policy, which says `later`, the student ends nearer to it than to where it began."""
    other = trained(bandit, ppo(), q=leans_to(bandit, "later"))
    config = ppo(kl_coefficient=1.0, missing_eos_penalty=0.0)
    student, _ = improve(bandit, likes(bandit, "maybe"), [prompt(bandit)], config, 0, reference=other, rollout_size=128)
    assert probability(student, "later") > 0.5


def test_a_whole_scale_of_q_changes_nothing(bandit: LanguagePolicy) -> None:
    """Q ten times as large over a scale ten times as large: the same policy."""
    tenfold = Taste(lambda tokens: 10.0 * float(tokens == said(bandit, "no")))
    config = ppo(episodes=256, kl_coefficient=0.1)
    one, _ = improve(bandit, likes(bandit, "no"), [prompt(bandit)], config, 0, scale=1.0)
    ten, _ = improve(bandit, tenfold, [prompt(bandit)], config, 0, scale=10.0)  # type: ignore[arg-type]
    assert all(torch.allclose(p, q, atol=1e-5) for p, q in zip(parameters(one), parameters(ten), strict=True))


def test_the_same_seed_gives_the_same_policy(bandit: LanguagePolicy) -> None:
    one, other, third = (parameters(trained(bandit, ppo(episodes=256), seed)) for seed in (0, 0, 1))
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(one, third, strict=True))


def test_no_episodes_leave_the_policy_as_it_is(bandit: LanguagePolicy) -> None:
    policy, curve = improve(bandit, likes(bandit, "no"), [prompt(bandit)], ppo(episodes=0), 0)
    assert policy is bandit and curve == []


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_the_policy_has_unlearnt_is_found_again_among_the_candidates_of_pi_0(
    bandit: LanguagePolicy, share: float
) -> None:
    """It says nothing but `maybe`; Q then comes to like `no`, which pi_0 says now and then."""
    sure = trained(bandit, ppo(episodes=2560))
    assert probability(sure, "no") < 0.2 * probability(bandit, "no")
    config, q = best_of(initial_share=share, samples=32, epochs=8.0), leans_to(bandit, "no")
    learnt, _ = improve_by_best(sure, q, [prompt(bandit)] * 128, config, 0, initial=bandit)
    assert (probability(learnt, "no") > 0.05) == (share > 0)


def test_the_best_of_n_is_asked_for_so_many_prompts_alone(bandit: LanguagePolicy) -> None:
    """A night's work does not grow with its log: as many updates, whatever the round."""
    for count, updates in ((40, 2 * 20), (500, 2 * 32)):
        how = best_of(prompts=64, epochs=2.0, batch_size=2)
        _, curve = improve_by_best(bandit, leans_to(bandit, "no"), [prompt(bandit)] * count, how, 0)
        assert len(curve) == updates


def test_candidates_of_pi_0_need_it_and_its_tokens(bandit: LanguagePolicy, tiny_policy: LanguagePolicy) -> None:
    config = load_config(overrides={"improve.best_of_n.initial_share": 0.5}).improve.best_of_n
    for initial, error, said_so in ((None, TrainingError, "not at hand"), (tiny_policy, ModelError, "other tokens")):
        with pytest.raises(error, match=said_so):
            improve_by_best(bandit, likes(bandit, "no"), [prompt(bandit)], config, 0, initial=initial)


def test_nothing_to_improve_on_is_an_error(bandit: LanguagePolicy) -> None:
    with pytest.raises(TrainingError, match="no prompt"):
        improve(bandit, likes(bandit, "no"), [], ppo(), 0)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 0.7, 1 / 3])
@pytest.mark.parametrize("penalty", [0.0, 0.2])
def test_a_q_that_is_the_same_for_every_response_is_an_error(
    bandit: LanguagePolicy, value: float, penalty: float
) -> None:
    """Also where the mean is not exactly the value, and where only the penalty tells responses apart."""
    with pytest.raises(TrainingError, match="same reward"):
        trained(bandit, ppo(missing_eos_penalty=penalty), q=Taste(lambda _: value))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reward_that_is_no_number_is_an_error(bandit: LanguagePolicy, value: float) -> None:
    with pytest.raises(TrainingError, match="not a number"):
        trained(bandit, ppo(), q=Taste(lambda tokens: value if len(tokens) == 2 else 0.0))


@pytest.mark.parametrize("how", ["ppo", "best_of_n"])
def test_a_policy_of_one_answer_is_not_blamed_on_q(bandit: LanguagePolicy, how: str) -> None:
    prompts = [prompt(bandit), prompt(bandit, "no")]
    with pytest.raises(TrainingError, match=r"one response alone, .* raise policy.temperature"):
        if how == "ppo":
            improve(bandit.at(1e-3), leans_to(bandit, "maybe"), prompts[:1], ppo(), 0)
        else:
            improve_by_best(bandit.at(1e-3), leans_to(bandit, "maybe"), prompts, best_of(), 0)


@pytest.mark.parametrize("how", ["ppo", "best_of_n"])
def test_a_q_that_knows_prompts_but_no_responses_is_an_error(bandit: LanguagePolicy, how: str) -> None:
    prompts = [prompt(bandit), prompt(bandit, "no")]
    with pytest.raises(TrainingError, match="all responses to a prompt the same reward"):
        if how == "ppo":
            improve(bandit, ByPrompt(), prompts, ppo(), 0)
        else:
            improve_by_best(bandit, ByPrompt(), prompts, best_of(), 0)


DIVERGING: dict[str, Callable[[LanguagePolicy, Checkpoint], object]] = {
    "improve.ppo.learning_rate": lambda policy, kept: improve(
        policy,
        leans_to(policy, "no"),
        [prompt(policy)],
        ppo(episodes=256, rollout=64, learning_rate=1e30),
        0,
        checkpoint=kept,
    ),
    "improve.best_of_n.learning_rate": lambda policy, kept: improve_by_best(
        policy,
        leans_to(policy, "no"),
        [prompt(policy)] * 64,
        best_of(epochs=8.0, batch_size=4, learning_rate=1e30),
        0,
        checkpoint=kept,
    ),
    "improve.logged.learning_rate": lambda policy, kept: improve_on_log(
        policy, log_of(policy, {"yes": 1.0, "no": -1.0}), logged(epochs=20.0, learning_rate=1e30), 0, checkpoint=kept
    ),
}


@pytest.mark.parametrize("setting", DIVERGING)
def test_updates_that_diverge_are_an_error_that_names_their_rate(
    bandit: LanguagePolicy, tmp_path: Path, setting: str
) -> None:
    kept = Checkpoint(tmp_path / "kept", "key")
    with pytest.raises(TrainingError, match=rf"diverged: .* at a learning rate of .*; lower {setting}"):
        DIVERGING[setting](bandit, kept)
    found = kept.load()
    assert found is None or all(torch.isfinite(t).all() for t in found[0].values()), "what is kept can be gone on from"


def test_a_gradient_that_another_pass_left_behind_does_not_count(bandit: LanguagePolicy) -> None:
    """Under LoRA the adapters of several passes are in one model."""
    trained_now, before = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    before.grad = torch.full((1,), 1e6)
    model = torch.nn.ParameterList([trained_now, before])
    before.requires_grad_(False)
    norm = take_step((0.5 * trained_now - 1.0).sum(), *optimizer_for(model, 0.1, 4))
    assert norm == pytest.approx(0.5)


# --- rollouts --------------------------------------------------------------------------------------------------------


def test_advantages_are_whitened_over_response_tokens_alone(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    """One advantage a response token, whatever the prompt's length: mean 0 and variance 1 over all of them."""
    prompts = [tiny_policy.renderer.prompt(t.state(i)).tokens for t in scripted[:10] for i in range(len(t.turns) - 1)]
    q = QModel.from_policy(tiny_policy, QSettings("bce", 0.0, 1.0, 0.95), seed=0)
    reference = with_noise(tiny_policy)
    config = ppo(kl_coefficient=0.3)
    episodes = roll_out(tiny_policy, reference, q, prompts, config, 0.5, seed=0)
    responses = tiny_policy.respond(prompts, seed=0)
    assert [len(a) for a in episodes.advantage] == [len(tokens) for tokens in responses.tokens]
    flat = np.concatenate(episodes.whitened())
    assert flat.mean() == pytest.approx(0.0, abs=1e-6) and flat.std() == pytest.approx(1.0, abs=1e-4)

    table = EncodedTable(
        [single(k, p, r, True) for k, (p, r) in enumerate(zip(prompts, responses.tokens, strict=True))], len(prompts)
    )
    own, other = token_log_probs(tiny_policy, table), token_log_probs(reference, table)
    values, raw = q.running_values(table.sequences), []
    for k, value in enumerate(values):
        reward = -0.3 * (own[k] - other[k])
        penalty = 0.0 if responses.finished[k] else config.missing_eos_penalty
        reward[-1] += value[-1] / 0.5 - penalty
        raw.append(gae(reward, value[:-1] / 0.5, config.gae_lambda))
        assert episodes.q[k] == pytest.approx(value[-1], abs=1e-5)
        assert episodes.kl[k] == pytest.approx(float((own[k] - other[k]).sum()), abs=1e-4)
    every = np.concatenate(raw)
    assert flat == pytest.approx((every - every.mean()) / every.std(), abs=1e-3)


def test_a_rollouts_advantages_and_its_clipped_loss_longhand(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    """Plain loops in float64, from log-probs as sampled and the running values of Q, agree to 1e-6."""
    prompts = [tiny_policy.renderer.prompt(t.state(i)).tokens for t in scripted[:6] for i in range(len(t.turns) - 1)]
    q = QModel.from_policy(tiny_policy, QSettings("bce", 0.0, 1.0, 0.95), seed=0)
    reference, student, scale, beta = with_noise(tiny_policy), with_noise(tiny_policy), 0.5, 0.3
    config = ppo(kl_coefficient=beta, epochs=1, minibatch_size=len(prompts))
    episodes = roll_out(tiny_policy, reference, q, prompts, config, scale, seed=0)
    old, anchor = episodes.old_log_p, token_log_probs(reference, episodes.table)
    values = q.running_values(episodes.table.sequences)

    plain: list[float] = []
    for k, running in enumerate(values):
        length = len(old[k])
        reward = [-beta * (float(old[k][t]) - float(anchor[k][t])) for t in range(length)]
        reward[-1] += float(running[-1]) / scale - (0.0 if episodes.finished[k] else config.missing_eos_penalty)
        v = [float(x) / scale for x in running[:-1]] + [0.0]
        delta = [reward[t] + v[t + 1] - v[t] for t in range(length)]
        plain += [sum(config.gae_lambda ** (j - t) * delta[j] for j in range(t, length)) for t in range(length)]
    mean = sum(plain) / len(plain)
    spread = math.sqrt(sum((x - mean) ** 2 for x in plain) / len(plain))
    white = [(x - mean) / (spread + 1e-8) for x in plain]
    assert np.concatenate(episodes.whitened()) == pytest.approx(white, abs=1e-6)

    now = [float(x) for part in token_log_probs(student, episodes.table) for x in part]
    before = [float(x) for part in old for x in part]
    ratio = [math.exp(one - other) for one, other in zip(now, before, strict=True)]
    bounded = [min(max(r, 1.0 - config.clip), 1.0 + config.clip) for r in ratio]
    gains = [min(r * a, b * a) for r, b, a in zip(ratio, bounded, white, strict=True)]
    run = begin(student, q, config, [len(prompts)], scale, 0)
    told = _update(run, episodes, config)
    assert told["loss"] == pytest.approx(-sum(gains) / len(gains), abs=1e-6)
    assert told["clip_fraction"] == pytest.approx(sum(abs(r - 1.0) > config.clip for r in ratio) / len(ratio))
    assert 0.1 < told["clip_fraction"] < 0.9


def with_noise(policy: LanguagePolicy) -> LanguagePolicy:
    model = copy.deepcopy(policy.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return LanguagePolicy(model, policy.tokenizer, policy.settings)


def test_token_log_probs_are_those_that_the_response_was_sampled_with(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    prompts = [tiny_policy.renderer.prompt(talk.state(0)).tokens for talk in scripted]
    responses = tiny_policy.respond(prompts, seed=4)
    table = EncodedTable(
        [single(k, p, r, True) for k, (p, r) in enumerate(zip(prompts, responses.tokens, strict=True))], len(prompts)
    )
    tokens = token_log_probs(tiny_policy, table)
    assert [len(log_p) for log_p in tokens] == [len(r) for r in responses.tokens]
    assert np.allclose(np.concatenate(tokens), np.concatenate(responses.token_logprobs), atol=1e-4)
    assert np.allclose([log_p.sum() for log_p in tokens], responses.logprobs, atol=2e-4)


def test_prompts_are_those_of_the_wanted_rows(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> None:
    """Line 6 of Algorithm 1, on shared sequences and on a row a turn alike."""
    frame = to_frame(scripted[:8], OUTCOMES, 0.3)
    sequences = round_of(tiny_policy, frame, load_config()).encoded.sequences
    expected = [
        tiny_policy.renderer.prompt(t.state(i)).tokens
        for t in scripted[:8]
        for i in range(len(t.turns))
        if not t.turns[i].terminal
    ]
    found = prompts_of(sequences, np.arange(len(frame)))
    assert list(found) == expected and found.lengths.tolist() == list(map(len, expected))
    assert list(prompts_of(sequences, np.array([0]))) == expected[:1]
    assert not prompts_of(sequences, np.array([], int))


def test_a_policy_is_at_no_distance_from_itself_and_q_scores_what_it_says(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    prompts = [tiny_policy.renderer.prompt(talk.state(0)).tokens for talk in scripted[:10]]
    q = QModel.from_policy(tiny_policy, QSettings("bce", 0.0, 1.0, 0.95), seed=0)
    spoken = speak(tiny_policy, tiny_policy, q, prompts, 3, seed=0)
    assert spoken.kl == 0.0 and spoken.q.shape == (10, 3)
    tokens = spoken.responses.tokens[4]
    alone = q.running_values([single(0, prompts[1], tokens, True)])[0][-1]
    assert spoken.q[1, 1] == pytest.approx(alone, abs=1e-5)
    assert speak(tiny_policy, with_noise(tiny_policy), q, prompts, 3, seed=0).kl > 0.0


# --- the logged pass -------------------------------------------------------------------------------------------------


def logged(**changes: Any) -> LoggedConfig:
    quick = {"epochs": 12.0, "learning_rate": 0.01, "batch_size": 16}
    return load_config().improve.logged.model_copy(update=quick | changes)


def log_of(policy: LanguagePolicy, advantage: dict[str, float], copies: int = 16) -> LoggedData:
    """Each word said `copies` times to the same prompt, with its advantage and its log-prob under `policy`."""
    words = list(advantage) * copies
    rows = [single(k, prompt(policy), said(policy, word), True) for k, word in enumerate(words)]
    table = EncodedTable(rows, len(rows))
    return LoggedData(table, np.array([advantage[word] for word in words]), policy.score(table))


def test_what_went_better_than_expected_is_said_more_and_what_went_worse_less(bandit: LanguagePolicy) -> None:
    before = parameters(bandit)
    data = log_of(bandit, {"yes": 1.0, "no": -1.0, "maybe": 0.0})
    student, curve = improve_on_log(bandit, data, logged(), seed=0)
    assert probability(student, "yes") > 1.2 * probability(bandit, "yes")
    assert probability(student, "no") < 0.8 * probability(bandit, "no")
    assert unchanged(bandit, before)
    assert curve[0]["clip_fraction"] == 0.0 < curve[-1]["clip_fraction"]
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_a_tighter_clip_stays_nearer(bandit: LanguagePolicy) -> None:
    data = log_of(bandit, {"yes": 1.0, "no": -1.0})
    moved = [
        abs(
            math.log(
                probability(improve_on_log(bandit, data, logged(clip=clip), 0)[0], "yes") / probability(bandit, "yes")
            )
        )
        for clip in (0.05, 1.0)
    ]
    assert 0.0 < moved[0] < moved[1]


def test_every_turn_weighs_the_same_whatever_the_length_of_its_conversation(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neighbours in length share a batch; still an epoch's mean gradient is that of the mean over all turns.

    Otherwise an action after which half of the conversations fail at once and half go on to succeed looks bad.
    """
    frame = to_frame(scripted, OUTCOMES, 0.3)
    table = round_of(tiny_policy, frame, load_config()).encoded
    score = tiny_policy.score(table)
    luck = np.random.default_rng(0).standard_normal(len(score))
    gradients: list[torch.Tensor] = []

    def record(batch: Batch, objective: Objective, optimizer: torch.optim.Optimizer, *_: Any) -> dict[str, float]:
        loss, _figures = objective(batch)
        gradients.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, optimizer.param_groups[0]["params"])])
        )
        return {"loss": 0.0}

    monkeypatch.setattr("iterative_ppo.learning.training.descend", record)
    data = LoggedData(table, luck, score)
    improve_on_log(tiny_policy, data, logged(epochs=1.0, batch_size=10), seed=0)
    apart = torch.stack(gradients)
    improve_on_log(tiny_policy, data, logged(epochs=1.0, batch_size=len(scripted)), seed=0)
    assert len(apart) == 6 and torch.allclose(apart.mean(0), gradients[-1], atol=1e-4)


def test_an_action_that_is_never_sampled_trains_nothing(bandit: LanguagePolicy) -> None:
    """It holds a token that the policy leaves out, so its ratio is no number; the others teach as without it."""
    data = log_of(bandit, {"yes": 1.0, "no": -1.0})
    never = int(bandit.banned[0])
    rows = [*data.encoded.sequences, single(len(data.advantage), prompt(bandit), (never, bandit.renderer.eos), True)]
    more = LoggedData(EncodedTable(rows, len(rows)), np.append(data.advantage, 0.0), np.append(data.behaviour, -3.0))
    assert np.isneginf(bandit.score(more.encoded)[-1])
    student, curve = improve_on_log(bandit, more, logged(), seed=0)
    assert all(np.isfinite(entry["loss"]) for entry in curve)
    assert probability(student, "yes") > 1.2 * probability(bandit, "yes")


def test_actions_without_a_log_prob_train_nothing(bandit: LanguagePolicy) -> None:
    data = log_of(bandit, {"yes": 1.0, "no": -1.0, "maybe": 0.5})
    unknown = np.arange(len(data.advantage)) % 3 == 2
    results = []
    for forged in (0.5, -40.0):
        changed = replace(
            data,
            advantage=np.where(unknown, forged, data.advantage),
            behaviour=np.where(unknown, math.nan, data.behaviour),
        )
        results.append(parameters(improve_on_log(bandit, changed, logged(epochs=2.0), 0)[0]))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_no_epochs_or_no_usable_row_leave_the_policy_as_it_is(bandit: LanguagePolicy) -> None:
    data = log_of(bandit, {"yes": 1.0, "no": -1.0})
    assert improve_on_log(bandit, data, logged(epochs=0.0), 0) == (bandit, [])
    unknown = replace(data, behaviour=np.full(len(data.behaviour), math.nan))
    assert improve_on_log(bandit, unknown, logged(), 0) == (bandit, [])


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3])
def test_advantages_that_are_all_equal_are_an_error(bandit: LanguagePolicy, value: float) -> None:
    data = log_of(bandit, {"yes": value, "no": value}, copies=9)
    with pytest.raises(TrainingError, match="all logged advantages are equal"):
        improve_on_log(bandit, data, logged(), 0)


def test_the_logged_pass_is_the_same_for_the_same_seed(bandit: LanguagePolicy) -> None:
    data = log_of(bandit, {"yes": 1.0, "no": -1.0})
    one, other = (parameters(improve_on_log(bandit, data, logged(), 3)[0]) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


# --- passes and policy iterations -------------------------------------------------------------------------------------


def config_with(**changes: Any) -> Config:
    return load_config(
        overrides={"improve.ppo.episodes": 64, "improve.logged.epochs": 1.0, "improve.logged.batch_size": 8} | changes
    )


def test_held_out_conversations_never_enter_the_improvement(
    tiny_policy: LanguagePolicy, scripted: list[Conversation]
) -> None:
    frame = to_frame(scripted, OUTCOMES, 0.3)
    config = config_with()
    data = round_of(tiny_policy, frame, config)
    q = QModel.from_policy(tiny_policy, QSettings("bce", 0.0, 1.0, 0.95), seed=0)
    behaviour = tiny_policy.score(data.encoded)
    prompts = prompts_of(data.encoded.sequences, np.flatnonzero(data.fit))
    results = []
    for reward in (data.reward, np.where(data.fit, data.reward, 1 - data.reward), 1 - data.reward):
        made = improve_policy(tiny_policy, replace(data, reward=reward), behaviour, q, prompts, config, seed=0)
        results.append(parameters(made.policy))
    assert all(torch.equal(p, q) for p, q in zip(results[0], results[1], strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(results[0], results[2], strict=True))


def test_the_logged_pass_asks_for_no_value_where_nothing_was_logged(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(
        "iterative_ppo.learning.rounds.turn_advantages", lambda *a: told.append(a) or turn_advantages(*a)
    )
    frame = to_frame(scripted[:20], OUTCOMES, 0.3)
    frame.loc[(frame["turn"] == 2) & actions(frame), ["suggestion", "suggestion_status"]] = [None, "missing"]
    config = config_with(**{"improve.ppo.episodes": 0, "improve.best_of_n.epochs": 0.0})
    data = round_of(tiny_policy, frame, config)
    q = QModel.from_policy(tiny_policy, QSettings("bce", 0.0, 1.0, 0.95), seed=0)
    prompts = prompts_of(data.encoded.sequences, np.flatnonzero(data.fit))
    improve_policy(tiny_policy, data, tiny_policy.score(data.encoded), q, prompts, config, seed=0)
    ((_, last, v, *_),) = told
    assert np.array_equal(np.isfinite(v), actions(frame)) and not actions(frame)[~last].all()


@pytest.mark.parametrize("reference", ["start", "champion"])
def test_ppo_follows_the_logged_pass_and_is_kept_near_the_reference_of_the_configuration(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], reference: str
) -> None:
    config = config_with(**{"improve.ppo.reference": reference, "improve.logged.learning_rate": 0.01})
    data = round_of(tiny_policy, to_frame(scripted, OUTCOMES, 0.3), config)
    q = QModel.from_policy(tiny_policy, QSettings("bce", 0.0, 1.0, 0.95), seed=0)
    prompts = prompts_of(data.encoded.sequences, np.flatnonzero(data.fit))
    made = improve_policy(tiny_policy, data, tiny_policy.score(data.encoded), q, prompts, config, seed=0)
    assert len(made.curves["logged"]) > 1 and len(made.curves["ppo"]) == 1
    start = made.curves["ppo"][0]["kl_to_reference"]
    assert abs(start) < 1e-5 if reference == "start" else abs(start) > 1e-3


@pytest.fixture
def iterated(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> Callable[..., Any]:
    """An improvement of the tiny policy, from conversations whose log-probs are its own, and `logged` or not."""

    def improved(logged: bool = True, **changes: Any) -> Any:
        usual = {"improve.logged.epochs": 0.0, "improve.best_of_n.epochs": 1.0, "improve.best_of_n.samples": 2}
        usual |= {"improve.q_iterations": 2, "q.epochs": 1.0, "q.samples": 2, "q.effective_size_floor": 1.0}
        config = config_with(**usual | changes)
        data = round_of(tiny_policy, to_frame(scripted, OUTCOMES, 0.3), config)
        own = tiny_policy.score(data.encoded)
        data = replace(data, behaviour=own if logged else np.full(len(own), np.nan))
        q = QModel.from_policy(tiny_policy, QSettings.of(config), seed=0)
        prompts = prompts_of(data.encoded.sequences, np.flatnonzero(data.fit))
        return improve_policy(tiny_policy, data, own, q, prompts, config, seed=0)

    return improved


def test_a_second_policy_iteration_is_against_q_of_the_student(
    iterated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It starts where the first ended, with Q of that policy from the champion's conversations."""
    students: list[list[torch.Tensor]] = []

    def told(policy: LanguagePolicy, current: Any, replay: Any, config: Config, *given: Any) -> QModel:
        students.append(parameters(policy))
        assert (config.q.target, config.q.iterations) == ("fqe", 2) and not replay
        return evaluate_policy(policy, current, replay, config, *given)

    monkeypatch.setattr(rounds, "evaluate_policy", told)
    once, twice = iterated(**{"improve.policy_iterations": 1}), iterated(**{"improve.policy_iterations": 2})
    assert len(students) == 1
    assert all(torch.equal(p, o) for p, o in zip(students[0], parameters(once.policy), strict=True))
    assert not all(torch.equal(p, o) for p, o in zip(students[0], parameters(twice.policy), strict=True))
    assert [entry["iteration"] for entry in twice.curves["ppo"]] == [1.0, 2.0]
    assert twice.curves["ppo"][0] == once.curves["ppo"][0]
    assert abs(twice.curves["ppo"][1]["kl_to_champion"]) > 1e-3 > abs(twice.curves["ppo"][1]["kl_to_reference"])
    assert twice.report["policy_iterations"] == 2.0 and twice.report["iteration_2_fit_effective_size"] > 0


def test_a_later_q_knows_only_the_log_probs_that_were_logged(iterated: Callable[..., Any]) -> None:
    """What stands in for them in the logged pass tells nothing of who wrote the conversations."""
    made = iterated(logged=False, **{"improve.policy_iterations": 2})
    assert made.report["iteration_2_fit_turns_without_logprob"] == made.report["iteration_2_fit_turns"] > 0
    assert "iteration_2_fit_effective_size" not in made.report


def test_a_policy_iteration_that_the_log_does_not_support_is_left_out(iterated: Callable[..., Any]) -> None:
    made = iterated(**{"improve.policy_iterations": 3, "q.effective_size_floor": 1e6})
    assert made.report == {"policy_iterations": 1.0, "iteration_left_out": 2.0}


def test_no_policy_iteration_follows_a_spent_budget(iterated: Callable[..., Any]) -> None:
    made = iterated(**{"improve.policy_iterations": 2, "improve.ppo.kl_budget": 1e-6})
    assert made.report["policy_iterations"] == 1.0


def test_a_budget_that_leaves_the_champion_as_it_is_rejects_the_round(
    iterated: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    tight = {"improve.ppo.kl_budget": 1e-6, "improve.ppo.learning_rate": 0.01}
    with pytest.raises(NothingToLearn, match=r"ppo gives what it began from: .* raise the budget; the round is reject"):
        iterated(**tight, **{"improve.best_of_n.epochs": 0.0, "improve.logged.epochs": 0.0})
    iterated(**tight, **{"improve.best_of_n.epochs": 0.0, "improve.logged.epochs": 1e-9})


def test_without_samples_there_is_nothing_to_iterate(iterated: Callable[..., Any]) -> None:
    nothing = {"improve.best_of_n.epochs": 0.0, "improve.ppo.episodes": 0, "improve.logged.epochs": 1.0}
    assert iterated(**{"improve.policy_iterations": 2, **nothing}).report == {"policy_iterations": 1.0}


@pytest.mark.parametrize("setting", ["logged.epochs", "policy_iterations"])
def test_rewards_other_than_those_of_q_are_refused(iterated: Callable[..., Any], setting: str) -> None:
    changes = {"improve.policy_iterations": 1, f"improve.{setting}": 2, "credit.assigner": "itpo"}
    with pytest.raises(TrainingError, match=rf"improve.{setting} learns from rewards of outcome, .*assigner itpo"):
        iterated(**changes)


def test_acceptance_takes_one_policy_iteration(iterated: Callable[..., Any]) -> None:
    made = iterated(**{"improve.policy_iterations": 2, "improve.reward": "acceptance"})
    assert made.report["policy_iterations"] == 1.0


# --- best of n -------------------------------------------------------------------------------------------------------


def best_of(**changes: Any) -> BestOfNConfig:
    usual = {"learning_rate": 0.02, "batch_size": 16, "temperature": 1.0}
    return load_config().improve.best_of_n.model_copy(update=usual | changes)


def test_the_best_is_the_one_that_q_likes_among_those_that_came_to_an_end() -> None:
    q = np.array([[0.1, 0.9, 0.5], [0.2, 0.1, 0.0], [0.3, 0.7, 0.1]])
    finished = np.array([[True, False, True], [True, True, True], [False, False, False]])
    assert best(q, finished).tolist() == [2, 0, 1]


def test_the_best_of_several_is_said_more_and_what_was_never_said_is_not(bandit: LanguagePolicy) -> None:
    """One pass moves the policy to what it said itself and Q likes; the champion stays as it is."""
    before = parameters(bandit)
    q = leans_to(bandit, "maybe")
    student, curve = improve_by_best(bandit, q, [prompt(bandit)] * 256, best_of(epochs=12.0), 0)
    assert curve[-1]["loss"] < curve[0]["loss"]
    old, new = (speak(p, bandit, q, [prompt(bandit)], 800, seed=1) for p in (bandit, student))
    worth, finished = old.q.reshape(-1, 8), old.responses.finished.reshape(-1, 8)
    aim = worth[np.arange(100), best(worth, finished)].mean()
    assert aim > old.q.mean() + 0.05
    assert new.q.mean() == pytest.approx(aim, abs=0.3 * (aim - old.q.mean()))
    assert unchanged(bandit, before)


def test_candidates_are_what_the_policy_is_surer_of(bandit: LanguagePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn at a share of the policy's own temperature; the student speaks at the policy's own again."""
    warm, drawn = bandit.at(0.8), []
    respond = LanguagePolicy.respond

    def told(policy: LanguagePolicy, *given: Any, **named: Any) -> Any:
        drawn.append(policy.settings.temperature)
        return respond(policy, *given, **named)

    monkeypatch.setattr(LanguagePolicy, "respond", told)
    student, _ = improve_by_best(warm, leans_to(bandit, "maybe"), [prompt(bandit)] * 8, best_of(temperature=0.5), 0)
    assert drawn == [pytest.approx(0.4)] and student.settings.temperature == 0.8


def test_prompts_of_which_a_block_is_held_at_a_time_give_the_same(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates do not depend on the block that their prompt is in, nor on where the prompts lie."""
    prompts = [tiny_policy.renderer.prompt(talk.state(0)).tokens for talk in scripted[:20]]
    q = Taste(lambda response: float(sum(response) % 97))
    config = load_config().improve.best_of_n.model_copy(update={"epochs": 1.0})
    whole, curve = improve_by_best(tiny_policy, q, prompts, config, 0)
    monkeypatch.setattr(best_of_n, "PROMPTS", 7)
    told: list[tuple[int, int]] = []
    stored = Beginnings.whole(tmp_path / "prompts", iter(prompts))
    pieces, again = improve_by_best(
        tiny_policy, q, stored, config, 0, progress=lambda done, total: told.append((done, total))
    )
    assert told[:3] == [(7, 20), (14, 20), (20, 20)]
    assert again == curve
    assert all(torch.equal(p, o) for p, o in zip(parameters(pieces), parameters(whole), strict=True))


def test_what_was_chosen_before_a_kill_is_not_drawn_again(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tiny_policy.renderer.prompt(talk.state(0)).tokens for talk in scripted[:20]]
    judged: list[int] = []

    class Counting(Taste):
        def running_values(self, sequences: list[Encoded]) -> list[np.ndarray]:
            judged.append(len(sequences))
            return super().running_values(sequences)

    q = Counting(lambda response: float(sum(response) % 97))
    config = load_config().improve.best_of_n.model_copy(update={"epochs": 1.0, "samples": 2, "initial_share": 0.5})
    monkeypatch.setattr(best_of_n, "PROMPTS", 7)
    whole, curve = improve_by_best(tiny_policy, q, prompts, config, 0, initial=tiny_policy)

    def kill(done: int, total: int) -> None:
        if done == 14:
            raise KeyboardInterrupt

    place = Checkpoint(tmp_path / "improving", "key").part("best_of_n", 50)
    with pytest.raises(KeyboardInterrupt):
        improve_by_best(tiny_policy, q, prompts, config, 0, kill, place, tiny_policy)
    judged.clear()
    again, found = improve_by_best(tiny_policy, q, prompts, config, 0, checkpoint=place, initial=tiny_policy)
    assert judged == [12], "the last block alone"
    assert found == curve
    assert all(torch.equal(p, o) for p, o in zip(parameters(again), parameters(whole), strict=True))


def test_another_temperature_is_the_same_weights_on_another_scale(bandit: LanguagePolicy) -> None:
    logits = torch.randn(5, bandit.model.config.vocab_size, generator=torch.Generator().manual_seed(0))
    allowed = bandit.log_distribution(logits).isfinite()
    aim = torch.log_softmax((logits / 0.25).masked_fill(~allowed, -math.inf), -1)
    assert torch.allclose(bandit.at(0.25).log_distribution(logits), aim, atol=1e-6)
    assert bandit.at(0.25).model is bandit.model and bandit.settings.temperature == 1.0


def test_more_samples_go_further(bandit: LanguagePolicy) -> None:
    q = leans_to(bandit, "maybe")
    reached = []
    for n in (2, 16):
        student, _ = improve_by_best(bandit, q, [prompt(bandit)] * 64, best_of(samples=n), 0)
        reached.append(speak(student, bandit, q, [prompt(bandit)], 400, seed=1).q.mean())
    assert reached[1] > reached[0] + 0.05


@pytest.mark.parametrize(("reward", "said_so"), [(0.3, "same reward"), (math.nan, "not a number")])
def test_the_best_of_what_q_cannot_tell_apart_is_an_error(bandit: LanguagePolicy, reward: float, said_so: str) -> None:
    with pytest.raises(TrainingError, match=said_so):
        improve_by_best(bandit, Taste(lambda _: reward), [prompt(bandit)], best_of(), 0)


def test_the_best_of_n_may_be_left_out(bandit: LanguagePolicy) -> None:
    assert improve_by_best(bandit, likes(bandit, "no"), [prompt(bandit)], best_of(epochs=0.0), 0) == (bandit, [])


def test_several_samples_of_a_prompt_stand_side_by_side_and_are_distributed_as_one(bandit: LanguagePolicy) -> None:
    prompts = [prompt(bandit), (*prompt(bandit), *bandit.renderer.ids("yes"))]
    many = bandit.respond(prompts, seed=3, samples=400)
    table = EncodedTable([single(k, prompts[k // 400], t, True) for k, t in enumerate(many.tokens)], 800)
    assert np.allclose([p.sum() for p in token_log_probs(bandit, table)], many.logprobs, atol=2e-4)
    one = [bandit.respond(prompts[:1] * 400, seed=4), many]
    ends = [np.mean([len(t) == 1 for t in r.tokens[:400]]) for r in one]
    assert ends[0] == pytest.approx(ends[1], abs=0.12)
    assert len(set(many.tokens[:400])) > 10


# --- budgets, critics, checkpoints -----------------------------------------------------------------------------------


def test_the_coefficient_adapts_to_its_target() -> None:
    config = ppo(kl_target=0.5)
    assert adapted(1.0, 5.0, config) == pytest.approx(1.2)
    assert adapted(1.0, 0.25, config) == pytest.approx(0.9)
    assert adapted(1.0, 0.5, config) == 1.0
    assert adapted(0.3, 5.0, ppo()) == 0.3


def test_a_target_holds_the_policy_at_its_distance(bandit: LanguagePolicy) -> None:
    config = ppo(episodes=1920, rollout=96, epochs=2, kl_coefficient=0.05, kl_target=0.5, learning_rate=0.01)
    _, curve = improve(bandit, leans_to(bandit, "maybe"), [prompt(bandit)], config, 0)
    free = improve(
        bandit, leans_to(bandit, "maybe"), [prompt(bandit)], config.model_copy(update={"kl_target": None}), 0
    )
    late = [np.mean([entry["kl_to_reference"] for entry in c[-6:]]) for c in (curve, free[1])]
    assert abs(late[0] - 0.5) < abs(late[1] - 0.5)
    assert curve[-1]["kl_coefficient"] > 0.05


def test_ppo_ends_at_its_budget_of_kl_to_the_champion(bandit: LanguagePolicy) -> None:
    config = ppo(episodes=2560, rollout=128, kl_budget=0.3)
    _, curve = improve(bandit, leans_to(bandit, "maybe"), [prompt(bandit)], config, 0)
    assert len(curve) < 20
    assert curve[-1]["kl_to_champion"] > 0.3 >= max(entry["kl_to_champion"] for entry in curve[:-1])
    assert curve[-1]["updates"] == 0.0


@pytest.mark.parametrize("episodes", [2560, 512])
def test_what_the_budget_gives_is_within_it(bandit: LanguagePolicy, tmp_path: Path, episodes: int) -> None:
    """Also where its last updates alone went too far; and a killed run gives the same."""
    config = ppo(episodes=episodes, rollout=128, kl_budget=0.3, learning_rate=0.003)
    given: Any = (bandit, leans_to(bandit, "maybe"), [prompt(bandit)], config, 0)
    student, curve = improve(*given)
    assert curve[-1]["kl_to_champion"] > 0.3, "it went too far"
    assert shown(curve) is curve[-2] and shown(curve)["kl_to_champion"] <= 0.3, "its figures are those of what it gives"
    assert 0.0 < distance(student, bandit) < 0.4

    def killed(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    kept = Checkpoint(tmp_path / "ppo", "key")
    with pytest.raises(KeyboardInterrupt):
        improve(*given, progress=killed, checkpoint=kept)
    resumed, again = improve(*given, checkpoint=kept)
    assert again == curve
    assert all(torch.equal(p, o) for p, o in zip(parameters(resumed), parameters(student), strict=True))


@pytest.mark.parametrize(
    ("episodes", "size", "sizes"),
    [
        (384, 128, [128, 128, 128]),
        (385, 128, [129, 128, 128]),
        (513, 512, [513]),
        (900, 512, [450, 450]),
        (10, 512, [10]),
    ],
)
def test_no_rollout_is_a_handful(bandit: LanguagePolicy, episodes: int, size: int, sizes: list[int]) -> None:
    """A budget or judges decide by what a rollout shows, the closing look of a guarded run among them."""
    seen: list[int] = []

    class Counting(Taste):
        def running_values(self, sequences: list[Encoded]) -> list[np.ndarray]:
            seen.append(len(sequences))
            return super().running_values(sequences)

    q = Counting(leans_to(bandit, "maybe").reward)
    improve(bandit, q, [prompt(bandit)], ppo(episodes=episodes, rollout=size, kl_budget=50.0, epochs=1), 0)
    assert seen == [*sizes, sizes[-1]] and sum(sizes) == episodes


def test_patience_gives_what_the_judges_liked_best(bandit: LanguagePolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the student that the second rollout showed, which the first one's updates made."""
    q, told = fitted(bandit, "later"), iter([0.1, 0.3, 0.2, 0.2, 0.1])

    def judge(self: QModel, sequences: list[Encoded]) -> list[np.ndarray]:
        value = next(told)
        return [np.full(1, value)] * len(sequences)

    monkeypatch.setattr(QModel, "judge_values", judge)
    with pytest.raises(ConfigError, match=r"this Q has none; set q\.judges"):
        improve(bandit, q, [prompt(bandit)], ppo(judge_patience=2), 0)
    q = q.with_settings(judges=1)
    monkeypatch.setattr(QModel, "running_values", lambda self, s: leans_to(bandit, "maybe").running_values(s))
    student, curve = improve(bandit, q, [prompt(bandit)], ppo(episodes=2560, rollout=128, judge_patience=2), 0)
    assert [entry["judge"] for entry in curve] == pytest.approx([0.1, 0.3, 0.2, 0.2])
    assert shown(curve) is curve[1]
    run = begin(bandit.trainable_copy(), q, ppo(episodes=2560, rollout=128), [128] * 20, 1.0, 0)
    advance(run, q, [prompt(bandit)], ppo(episodes=2560, rollout=128), 128, 1.0, 0, None)
    assert all(torch.equal(p, o) for p, o in zip(parameters(student), parameters(run.student), strict=True))


@pytest.mark.parametrize("log_p, reference", [([-1.0, -2.0], [-1.5, -0.5]), ([-0.1], [-0.1])])
def test_kl_both_ways_longhand(log_p: list[float], reference: list[float]) -> None:
    rho = [math.exp(r - p) for p, r in zip(log_p, reference, strict=True)]
    forward, backward = kl_both_ways(np.array(log_p), np.array(reference))
    assert forward == pytest.approx(-sum(math.log(x) for x in rho), abs=1e-9)
    assert backward == pytest.approx(sum(x * math.log(x) - x + 1 for x in rho), abs=1e-9)


def fitted(policy: LanguagePolicy, text: str) -> QModel:
    texts = [*WORDS, "yes no", "maybe yes"] * 4
    table = EncodedTable([single(k, prompt(policy), said(policy, t), True) for k, t in enumerate(texts)], len(texts))
    q = QModel.from_policy(policy, QSettings("bce", 0.0, 1.0, 0.95), seed=0)
    regress(q, table, np.array([float(t == text) for t in texts]), Regression(20.0, 0.01, 16, 0.5), seed=0)
    return q


def test_a_critic_that_learns_explains_the_returns_and_leaves_q_frozen(bandit: LanguagePolicy) -> None:
    q = fitted(bandit, "later")
    before = [p.detach().clone() for p in q.model.parameters()]
    config = ppo(critic="learned", critic_learning_rate=0.01, episodes=1280, rollout=128)
    _, curve = improve(bandit, q, [prompt(bandit)], config, 0)
    assert curve[-1]["critic_loss"] < curve[0]["critic_loss"]
    assert curve[-1]["q"] > 2 * curve[0]["q"]
    assert all(torch.equal(p, old) for p, old in zip(q.model.parameters(), before, strict=True))


@pytest.mark.parametrize("pessimism", [0.0, 1.0, "min"])
def test_a_critic_says_what_it_was_taught_also_of_a_pessimistic_q(
    bandit: LanguagePolicy, pessimism: float | str
) -> None:
    q = QModel.from_policy(bandit, QSettings("mse", 0.0, 1.0, 0.95, members=3, pessimism=pessimism), seed=0)
    sequences = [single(k, prompt(bandit), said(bandit, text), True) for k, text in enumerate(WORDS)]
    returns = [np.full(len(s.tokens) - s.spans[0].start, 0.8) for s in sequences]
    critic = LearnedCritic(q, learning_rate=0.01, steps=200, scale=0.5)
    for _ in range(200):
        critic.learn(collate(sequences, bandit.pad), returns, usual=float(sum(map(len, returns))))
    for values in critic.running_values(sequences):
        assert values[:-1] == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("critic", ["q", "learned"])
def test_killed_between_rollouts_it_ends_with_the_same_weights(
    bandit: LanguagePolicy, tmp_path: Path, critic: str
) -> None:
    q, told = fitted(bandit, "later"), []
    config = ppo(critic=critic, episodes=500, rollout=128, kl_coefficient=0.1, kl_target=0.4)
    whole, curve = improve(bandit, q, [prompt(bandit)], config, 0)

    def killed(done: int, total: int) -> None:
        told.append(done)
        if done == 2:
            raise KeyboardInterrupt

    checkpoint = Checkpoint(tmp_path / "ppo", "key")
    with pytest.raises(KeyboardInterrupt):
        improve(bandit, q, [prompt(bandit)], config, 0, progress=killed, checkpoint=checkpoint)
    told.clear()
    resumed, again = improve(bandit, q, [prompt(bandit)], config, 0, progress=killed, checkpoint=checkpoint)
    assert told == [3, 4], "what was done is not done again"
    assert again == curve
    assert all(torch.equal(p, o) for p, o in zip(parameters(resumed), parameters(whole), strict=True))


def test_killed_within_a_pass_it_ends_with_the_same_weights(bandit: LanguagePolicy, tmp_path: Path) -> None:
    q, checkpoint = leans_to(bandit, "maybe"), Checkpoint(tmp_path / "pass", "key", every=3)
    config = best_of(epochs=3.0)
    given: Any = (bandit, q, [prompt(bandit)] * 64, config, 0)
    whole, curve = improve_by_best(*given)

    def killed(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        improve_by_best(*given, progress=killed, checkpoint=checkpoint)
    told: list[int] = []
    resumed, again = improve_by_best(*given, progress=lambda done, _: told.append(done), checkpoint=checkpoint)
    assert told[0] == 7 and again == curve, "nothing is drawn or learnt again"
    assert all(torch.equal(p, o) for p, o in zip(parameters(resumed), parameters(whole), strict=True))


def test_a_checkpoint_of_other_inputs_and_a_damaged_one_are_errors(tmp_path: Path) -> None:
    kept = Checkpoint(tmp_path / "one", "key")
    kept.save({"a": torch.ones(2)}, {"curve": []})
    with pytest.raises(StoreError, match=r"one: the checkpoint of .* another configuration or other inputs"):
        Checkpoint(tmp_path / "one", "other").load()
    found = kept.load()
    assert found is not None and found[0]["a"].tolist() == [1.0, 1.0]
    (tmp_path / "one" / "tensors.safetensors").write_bytes(b"torn")
    with pytest.raises(StoreError, match="damaged checkpoint"):
        kept.load()
