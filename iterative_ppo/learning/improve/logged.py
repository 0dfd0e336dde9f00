"""A single-turn improvement on the logged actions: clipped ratios to the logged log-probs, advantages from V.

This pass is ours, not the paper's. It asks of each action that was really taken whether it went better than V said,
so it needs no generalisation of Q over actions; PPO on sampled actions follows it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from iterative_ppo.config import LoggedConfig
from iterative_ppo.errors import NothingToLearn
from iterative_ppo.learning.batching import Batch, EncodedTable, step_count, trained_turns, training_batches
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.improve.ppo import clipped, surrogate
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.optimization import set_by
from iterative_ppo.learning.sequences import Chosen
from iterative_ppo.learning.training import Curve, Progress, train
from iterative_ppo.mdp.returns import lambda_returns


def turn_advantages(reward: np.ndarray, last: np.ndarray, v: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """(N,) GAE(lambda) over turns: sum_k (gamma lambda)^k delta_{i+k}, delta_i = r_i + gamma V(s_{i+1}) - V(s_i).

    Which is the lambda-return less V(s_i) (Schulman et al. 2015, arXiv 1506.02438, Eq. 16).

    Args:
        v: (N,) V(s_i), NaN in terminal rows and where no action was logged: the advantage is 0 there, and the return
            goes on over it.
    """
    return np.where(np.isnan(v), 0.0, lambda_returns(reward, last, v, gamma, lam) - v)


@dataclass(frozen=True)
class LoggedData:
    """Encoded conversations with, per row, the advantage and the behaviour log-prob (NaN where a row may not train)."""

    encoded: EncodedTable
    advantage: np.ndarray
    behaviour: np.ndarray


def logged_objective(
    log_prob: torch.Tensor, behaviour: torch.Tensor, advantage: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(S,) the clipped objective of whole responses (Schulman et al. 2017, Eq. 7), and which of them are clipped."""
    behaviour = log_prob - (log_prob - behaviour).clamp(-20.0, 20.0)
    return surrogate(log_prob, behaviour, advantage, clip), clipped(log_prob, behaviour, clip)


def improve_on_log(
    policy: LanguagePolicy,
    data: LoggedData,
    config: LoggedConfig,
    seed: int,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> tuple[LanguagePolicy, Curve]:
    """A copy of `policy` improved on logged turns, and its curve. Zero epochs leave the policy as it is.

    Raises NothingToLearn where all advantages are equal, as a single turn's is.
    """
    usable = np.isfinite(data.behaviour) & np.isfinite(data.advantage)
    turns = trained_turns(data.encoded.sequences, usable)
    sequences = Chosen(data.encoded.sequences, np.flatnonzero(turns))
    steps = step_count(len(sequences), config.batch_size, config.epochs)
    if not config.epochs or not steps:
        return policy, []
    spread = data.advantage[usable].std()
    if np.ptp(data.advantage[usable]) <= 1e-9 * np.abs(data.advantage[usable]).max():
        raise NothingToLearn(
            f"all logged advantages are equal, of {usable.sum()} turns with a behaviour_logprob: nothing to learn from "
            "(are all outcomes the same?)"
        )
    advantage = (data.advantage - data.advantage[usable].mean()) / spread
    student = policy.trainable_copy()
    usual = turns.sum() / step_count(len(sequences), config.batch_size, 1.0)

    def objective(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        spans = np.flatnonzero(batch.trains & usable[batch.row])
        log_prob, rows = student.response_log_probs(batch, spans), batch.row[spans]
        said = torch.isfinite(log_prob.detach())  # what holds a token that is never sampled has no ratio
        old, gain = (torch.from_numpy(x[rows]).to(log_prob)[said] for x in (data.behaviour, advantage))
        log_prob = log_prob[said]
        value, outside = logged_objective(log_prob, old, gain, config.clip)
        # neighbours in length share a batch: over the usual number of turns, a turn weighs the same in each
        return -value.sum() / usual, {"clip_fraction": outside.sum() / usual}

    batches = training_batches(sequences, config.batch_size, config.epochs, policy.pad, np.random.default_rng(seed))
    with set_by("improve.logged.learning_rate"):
        curve = train(student, batches, steps, objective, config.learning_rate, progress, checkpoint)
    return student, curve
