"""Other ways to learn from as many conversations, beside which Iterative PPO is measured.

None of them has a Q of actions. Those with a value function fit it to the same Monte Carlo returns as Q's own V.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pandas as pd
import torch

from iterative_ppo.config import Config, LoggedConfig
from iterative_ppo.environments.rollout import collect, play
from iterative_ppo.errors import NothingToLearn
from iterative_ppo.learning.batching import Batch, EncodedTable, collate, step_count, training_batches
from iterative_ppo.learning.improve.logged import LoggedData, improve_on_log, turn_advantages
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.optimization import optimizer_for, take_step
from iterative_ppo.learning.policy_evaluation import Round
from iterative_ppo.learning.rounds import evaluate_policy, round_of
from iterative_ppo.learning.supervised import fine_tune
from iterative_ppo.learning.training import train
from iterative_ppo.mdp.conversation import Turn
from iterative_ppo.mdp.rendering import Encoded, single
from tasks.traffic import environment, to_rows

Learner = Callable[[LanguagePolicy, list[Any], Config], LanguagePolicy]
"""From a policy and its conversations to the next policy."""
ONLINE = 250
"""Conversations between two updates of those that learn online: six deployments where the others make one."""
GENTLE = {"learning_rate": 0.001, "epochs": 4.0}
TRAJECTORY = LoggedConfig(epochs=5.0, learning_rate=0.001, batch_size=64, clip=0.2, gae_lambda=0.95)
EACH_DEPLOYMENT = TRAJECTORY.model_copy(update={"epochs": 1.0})
"""Of the online learner: with five epochs it unlearnt how to write, with two at a lower rate it was slower."""
AWR_TEMPERATURE, LARGEST_WEIGHT = 1.0, 20.0
REFUEL_ETA, REFUEL_EPOCHS = 3.0, 4.0


def sharpened(policy: LanguagePolicy, talks: list[Any], config: Config) -> LanguagePolicy:
    """The same weights at half the temperature: what surer speech gains without any learning."""
    return policy.at(policy.settings.temperature / 2)


def cloned(policy: LanguagePolicy, talks: list[Any], config: Config) -> LanguagePolicy:
    """Filtered behaviour cloning: the conversations that succeeded, again."""
    won = [talk for talk in talks if talk.turns[-1].outcomes[0] > 0]
    sequences = [s for talk in won for s in policy.renderer.encode(talk)[0]]
    return fine_tune(policy, sequences, config.supervised.model_copy(update=GENTLE), config.seed)[0]


def actor_critic(policy: LanguagePolicy, talks: list[Any], config: Config) -> LanguagePolicy:
    """Trajectory actor-critic: PPO's clipped ratios on what was said, GAE over turns from a Monte Carlo V."""
    frame, current, v = _valued(policy, talks, config)
    advantage = turn_advantages(current.reward, current.last, v, config.gamma, TRAJECTORY.gae_lambda)
    return improve_on_log(policy, LoggedData(current.encoded, advantage, _behaviour(frame)), TRAJECTORY, config.seed)[0]


def advantage_weighted(policy: LanguagePolicy, talks: list[Any], config: Config) -> LanguagePolicy:
    """Advantage-weighted regression (Peng et al. 2019, arXiv 1910.00177): what was said, weighted by exp(A / beta)."""
    _, current, v = _valued(policy, talks, config)
    advantage = np.nan_to_num(current.returns - v)
    weight = np.minimum(np.exp(advantage / np.nanstd(advantage) / AWR_TEMPERATURE), LARGEST_WEIGHT)
    student, sequences = policy.trainable_copy(), current.encoded.sequences
    usual = sum(span.trains for s in sequences for span in s.spans) / step_count(len(sequences), 64, 1.0)

    def objective(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        spans = np.flatnonzero(batch.trains)
        log_p = student.response_log_probs(batch, spans)
        return -(torch.from_numpy(weight[batch.row[spans]]).to(log_p) * log_p).sum() / usual, {}

    rng = np.random.default_rng(config.seed)
    batches = training_batches(sequences, 64, GENTLE["epochs"], policy.pad, rng)
    train(student, batches, step_count(len(sequences), 64, GENTLE["epochs"]), objective, GENTLE["learning_rate"])
    return student


def online_rloo(policy: LanguagePolicy, conversations: int, config: Config, seed: int) -> LanguagePolicy:
    """Trajectory RLOO (Ahmadian et al. 2024, 2402.14740): the outcome, less the others' mean, on every turn; online."""
    for k in range(conversations // ONLINE):
        talks = collect(policy, environment(config), ONLINE, seed + 100_000 * (k + 1), f"online-{k}")
        frame = to_rows(config, talks)
        current = round_of(policy, frame, config)
        number = frame["conversation_id"].factorize()[0]
        outcome = np.bincount(number, weights=current.reward)
        others = (outcome.sum() - outcome) / (len(outcome) - 1)
        data = LoggedData(current.encoded, (outcome - others)[number], _behaviour(frame))
        with suppress(NothingToLearn):  # one that has unlearnt to sell, or to speak, stays as it is
            policy = improve_on_log(policy, data, EACH_DEPLOYMENT, config.seed)[0]
    return policy


def refuel(policy: LanguagePolicy, conversations: int, config: Config, seed: int) -> LanguagePolicy:
    """REFUEL (Gao et al. 2024, arXiv 2410.04612): log-ratios regressed on the difference that two responses made.

    Half of the conversations are had as they come; one turn of each, drawn at random, is then taken again with another
    response and played to its end, which only a simulator allows.
    """
    world, rng = environment(config), np.random.default_rng(seed)
    talks = collect(policy, world, conversations // 2, seed, "refuel")
    turns = [int(rng.integers(len(talk.turns) - 1)) for talk in talks]
    states = [talk.state(turn) for talk, turn in zip(talks, turns, strict=True)]
    again = policy.sample(states, seed)
    branches = [world.resume(state, 1, seed + k)[0] for k, state in enumerate(states)]  # type: ignore[attr-defined]
    for branch, action in zip(branches, again, strict=True):
        branch.step(action)
    play(policy, branches, seed + 1)
    told = [
        discounted(talk.turns, k, config.gamma) - discounted(branch.turns, k, config.gamma)
        for talk, branch, k in zip(talks, branches, turns, strict=True)
    ]
    pairs = [(talk.turns[k].suggestion, other) for talk, k, other in zip(talks, turns, again, strict=True)]
    sequences = [
        single(2 * k + i, policy.renderer.prompt(state).tokens, policy.renderer.response(action), True)
        for k, (state, pair) in enumerate(zip(states, pairs, strict=True))
        for i, action in enumerate(pair)
    ]
    return _regressed(policy, sequences, np.array(told), seed)


def _regressed(policy: LanguagePolicy, sequences: list[Encoded], difference: np.ndarray, seed: int) -> LanguagePolicy:
    """Least squares of the two log-ratios' difference on REFUEL_ETA times that of the returns; pairs are neighbours."""
    before = policy.score(EncodedTable(sequences, len(sequences)))
    known = np.flatnonzero(np.isfinite(before).reshape(-1, 2).all(axis=1))  # whose text spells what was sampled
    student, rng = policy.trainable_copy(), np.random.default_rng(seed)
    steps = step_count(len(known), 32, REFUEL_EPOCHS)
    optimizer, schedule = optimizer_for(student.model, GENTLE["learning_rate"], steps)
    order = np.concatenate([rng.permutation(known) for _ in range(int(REFUEL_EPOCHS))])
    for chosen in np.array_split(order, steps):
        batch = collate([sequences[2 * k + i] for k in chosen for i in (0, 1)], policy.pad)
        ratio = student.response_log_probs(batch, np.arange(len(batch.row))) - torch.from_numpy(before[batch.row])
        told = torch.from_numpy(REFUEL_ETA * difference[chosen])
        take_step((ratio[0::2] - ratio[1::2] - told).square().mean(), optimizer, schedule)
    return student


def discounted(turns: Sequence[Turn], begin: int, gamma: float) -> float:
    """The return of a turn of a conversation of one outcome."""
    return float(gamma ** (len(turns) - 2 - begin) * turns[-1].outcomes[0])


def _valued(policy: LanguagePolicy, talks: list[Any], config: Config) -> tuple[pd.DataFrame, Round, np.ndarray]:
    """The conversations as rows and as tokens, and (N,) a Monte Carlo V of their states."""
    frame = to_rows(config, talks)
    current = round_of(policy, frame, config)
    plain = config.model_copy(update={"q": config.q.model_copy(update={"target": "monte_carlo"})})
    return frame, current, evaluate_policy(policy, current, [], plain).evaluate(current.encoded).v


def _behaviour(frame: pd.DataFrame) -> np.ndarray:
    found: np.ndarray = frame["behaviour_logprob"].to_numpy(dtype=float, na_value=np.nan)
    return found
