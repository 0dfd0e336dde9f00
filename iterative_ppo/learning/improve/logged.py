"""A single-turn improvement on the logged actions: clipped ratios to the logged log-probs, advantages from V.

This pass is ours, not the paper's. It asks of each action that was really taken whether it went better than V said,
so it needs no generalisation of Q over actions; PPO on sampled actions follows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from iterative_ppo.config import LoggedConfig
from iterative_ppo.errors import TrainingError
from iterative_ppo.learning.batching import Batch, EncodedTable, step_count, training_batches
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.q_model import optimizer_for, take_step
from iterative_ppo.mdp.returns import discounted_returns


def turn_advantages(reward: np.ndarray, last: np.ndarray, v: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """(N,) GAE(lambda) over turns: sum_k (gamma lambda)^k delta_{i+k}, delta_i = r_i + gamma V(s_{i+1}) - V(s_i).

    Args:
        v: (N,) V(s_i), NaN in terminal rows, whose advantage is 0 (Schulman et al. 2015, arXiv 1506.02438, Eq. 16).
    """
    following = np.where(last, 0.0, np.nan_to_num(np.append(v[1:], np.nan)))
    delta = np.where(last | np.isnan(v), 0.0, reward + gamma * following - np.nan_to_num(v))
    return discounted_returns(delta, last, gamma * lam)


@dataclass(frozen=True)
class LoggedData:
    """Encoded conversations with, per row, the advantage and the behaviour log-prob (NaN where a row may not train)."""

    encoded: EncodedTable
    advantage: np.ndarray
    behaviour: np.ndarray


def logged_loss(
    log_prob: torch.Tensor, behaviour: torch.Tensor, advantage: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate over whole responses, and the share of them that is clipped (Schulman et al. 2017, Eq. 7)."""
    ratio = torch.exp((log_prob - behaviour).clamp(-20.0, 20.0))
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
    return -surrogate.mean(), ((ratio - 1.0).abs() > clip).float().mean()


def improve_on_log(
    policy: LanguagePolicy,
    data: LoggedData,
    config: LoggedConfig,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LanguagePolicy, list[dict[str, float]]]:
    """A copy of `policy` improved on logged turns, and its curve. Zero epochs leave the policy as it is."""
    usable = np.isfinite(data.behaviour) & np.isfinite(data.advantage)
    sequences = [s for s in data.encoded.sequences if any(x.trains and usable[x.row] for x in s.spans)]
    steps = step_count(len(sequences), config.batch_size, config.epochs)
    if not config.epochs or not steps:
        return policy, []
    spread = data.advantage[usable].std()
    if np.ptp(data.advantage[usable]) <= 1e-9 * np.abs(data.advantage[usable]).max():
        raise TrainingError("all logged advantages are equal: nothing to learn from (are all outcomes the same?)")
    advantage = (data.advantage - data.advantage[usable].mean()) / spread
    model = copy.deepcopy(policy.model)
    student = LanguagePolicy(model, policy.tokenizer, policy.settings)
    optimizer, schedule = optimizer_for(model, config.learning_rate, steps)
    curve = []
    turns = sum(x.trains and bool(usable[x.row]) for s in sequences for x in s.spans)
    usual = turns / step_count(len(sequences), config.batch_size, 1.0)
    rng = np.random.default_rng(seed)
    for step, batch in enumerate(training_batches(sequences, config.batch_size, config.epochs, policy.pad, rng)):
        spans = np.flatnonzero(batch.trains & usable[batch.row])
        loss, clipped = _batch_loss(student, batch, spans, advantage, data.behaviour, config.clip)
        loss = loss * (len(spans) / usual)  # neighbours in length share a batch: a turn weighs the same in each
        norm = take_step(model, loss, optimizer, schedule)
        curve.append({"loss": loss.item(), "clip_fraction": clipped.item(), "gradient_norm": norm})
        if progress:
            progress(step + 1, steps)
    if not np.isfinite(curve[-1]["loss"]):
        raise TrainingError("the logged pass diverged; lower improve.logged.learning_rate")
    return student, curve


def _batch_loss(
    student: LanguagePolicy,
    batch: Batch,
    spans: np.ndarray,
    advantage: np.ndarray,
    behaviour: np.ndarray,
    clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    log_prob = student.response_log_probs(batch, spans)
    rows = batch.row[spans]
    old = torch.from_numpy(behaviour[rows]).to(log_prob)
    return logged_loss(log_prob, old, torch.from_numpy(advantage[rows]).to(log_prob), clip)
