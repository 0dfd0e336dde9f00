"""Token-level PPO against a frozen Q (line 7 of Algorithm 1; Schulman et al. 2017, arXiv 1707.06347).

Token gamma is 1. The reward is Q(s, a) at the last token and -beta (log pi - log pi_ref) at each. The critic is the
frozen Q's own running value, so no second network is trained. Advantages are GAE with V = 0 after the end of sequence,
whitened over response tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from iterative_ppo.config import PPOConfig
from iterative_ppo.errors import TrainingError
from iterative_ppo.learning.batching import EncodedTable, inference_batches, training_batches
from iterative_ppo.learning.language_model import INFERENCE_TOKENS, LanguagePolicy
from iterative_ppo.learning.q_model import QModel, optimizer_for, take_step
from iterative_ppo.mdp.rendering import Encoded, Span, single

Prompts = Sequence[tuple[int, ...]]


def gae(reward: np.ndarray, value: np.ndarray, lam: float) -> np.ndarray:
    """(L,) advantages of one response's tokens with gamma 1 and V = 0 after the last.

    Args:
        reward: (L,) one a token. value: (L,) V before each token.
    """
    advantage = np.zeros(len(reward))
    running, following = 0.0, 0.0
    for t in range(len(reward) - 1, -1, -1):
        running = reward[t] + following - value[t] + lam * running
        following = value[t]
        advantage[t] = running
    return advantage


def ppo_loss(
    log_p: torch.Tensor, old_log_p: torch.Tensor, advantage: torch.Tensor, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Clipped surrogate over tokens, and the share of tokens where the clip binds."""
    ratio = torch.exp(log_p - old_log_p)
    surrogate = torch.minimum(ratio * advantage, ratio.clamp(1.0 - clip, 1.0 + clip) * advantage)
    return -surrogate.mean(), ((ratio - 1.0).abs() > clip).float().mean()


@dataclass(frozen=True)
class Episodes:
    """Sampled responses, one sequence each. Per episode: Q, reward, KL; per token: old log-prob, advantage."""

    table: EncodedTable
    q: np.ndarray
    reward: np.ndarray
    kl: np.ndarray
    finished: np.ndarray
    old_log_p: list[np.ndarray]
    advantage: list[np.ndarray]


def response_rewards(
    values: Sequence[np.ndarray], finished: np.ndarray, scale: float, missing_eos_penalty: float
) -> np.ndarray:
    """(N,) Q(s, a) / scale at the last token, minus the penalty where the response reached the length limit.

    A response cut at the limit gets Q of what it wrote and its penalty, never a bootstrap from a value beyond it.
    """
    q = np.array([value[-1] for value in values]) / scale
    return q - np.where(finished, 0.0, missing_eos_penalty)


@torch.inference_mode()
def token_log_probs(policy: LanguagePolicy, table: EncodedTable) -> list[np.ndarray]:
    """Per single-turn sequence: (length,) log pi of its response tokens."""
    result: list[np.ndarray] = [np.empty(0)] * table.rows
    for batch in inference_batches(table.sequences, INFERENCE_TOKENS, policy.pad):
        spans = np.arange(len(batch.row))
        log_p, index = policy.token_log_probs(batch, spans)
        parts = np.split(log_p.cpu().numpy(), np.flatnonzero(np.diff(index.cpu().numpy())) + 1)
        for row, part in zip(batch.row, parts, strict=True):
            result[row] = part
    return result


def roll_out(
    policy: LanguagePolicy,
    reference: LanguagePolicy,
    q: QModel,
    prompts: Prompts,
    config: PPOConfig,
    scale: float,
    seed: int,
) -> Episodes:
    """Sample one response a prompt and compute its token rewards and advantages."""
    responses = policy.respond(prompts, seed)
    sequences = [
        single(k, prompt, tokens, True)
        for k, (prompt, tokens) in enumerate(zip(prompts, responses.tokens, strict=True))
    ]
    table = EncodedTable(sequences, len(sequences))
    values = [value / scale for value in q.running_values(sequences)]
    reward = response_rewards(values, responses.finished, 1.0, config.missing_eos_penalty)
    if not np.isfinite(reward).all():
        raise TrainingError("Q gave a reward that is not a number; the round is rejected")
    old = token_log_probs(policy, table)
    anchor = token_log_probs(reference, table)
    advantages, kls = [], np.zeros(len(sequences))
    for k, (log_p, ref) in enumerate(zip(old, anchor, strict=True)):
        token_reward = -config.kl_coefficient * (log_p - ref)
        token_reward[-1] += reward[k]
        kls[k] = (log_p - ref).sum()
        advantages.append(gae(token_reward, values[k][:-1], config.gae_lambda))
    flat = np.concatenate(advantages)
    mean, spread = flat.mean(), flat.std()
    whitened = [(a - mean) / (spread + 1e-8) for a in advantages]
    q_values = np.array([value[-1] * scale for value in values])
    return Episodes(table, q_values, reward, kls, responses.finished, old, whitened)


def improve(
    policy: LanguagePolicy,
    q: QModel,
    prompts: Prompts,
    config: PPOConfig,
    seed: int,
    reference: LanguagePolicy | None = None,
    scale: float = 1.0,
    rollout_size: int = 512,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LanguagePolicy, list[dict[str, float]]]:
    """SingleTurnOpt(Q) by PPO: a copy of `policy` improved on `prompts`, and its curve, one entry a rollout.

    Args:
        reference: whom the KL penalty keeps it near; None means `policy` itself.
        scale: the reward is Q / scale, so that beta means the same whatever Q's spread.

    Raises TrainingError where there is no prompt, the reward is constant over the first rollout or not a number, or
    an update is not finite.
    """
    if not config.episodes:
        return policy, []
    if not prompts:
        raise TrainingError("no prompt to improve on")
    model = copy.deepcopy(policy.model)
    student = LanguagePolicy(model, policy.tokenizer, policy.settings)
    anchor = reference or policy
    rng = np.random.default_rng(seed)
    rollouts = -(-config.episodes // rollout_size)
    per_rollout = min(rollout_size, config.episodes)
    steps = rollouts * config.epochs * -(-per_rollout // config.minibatch_size)
    optimizer, schedule = optimizer_for(model, config.learning_rate, steps)
    curve = []
    for k in range(rollouts):
        chosen = [prompts[i] for i in rng.integers(len(prompts), size=per_rollout)]
        episodes = roll_out(student, anchor, q, chosen, config, scale, seed + 7919 * (k + 1))
        if k == 0 and np.ptp(episodes.q) <= 1e-6 * np.abs(episodes.q).max():
            raise TrainingError("Q gives every response the same reward: nothing to improve; the round is rejected")
        losses = _update(student, episodes, config, optimizer, schedule, rng)
        curve.append(_summary(episodes, losses))
        if progress:
            progress(k + 1, rollouts)
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        raise TrainingError("PPO diverged; lower improve.ppo.learning_rate")
    return student, curve


def _update(
    student: LanguagePolicy,
    episodes: Episodes,
    config: PPOConfig,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    rng: np.random.Generator,
) -> list[tuple[float, float]]:
    losses = []
    for batch in training_batches(episodes.table.sequences, config.minibatch_size, config.epochs, student.pad, rng):
        log_p, _ = student.token_log_probs(batch, np.arange(len(batch.row)))
        old = np.concatenate([episodes.old_log_p[row] for row in batch.row])
        advantage = np.concatenate([episodes.advantage[row] for row in batch.row])
        loss, clipped = ppo_loss(
            log_p, torch.from_numpy(old).to(log_p), torch.from_numpy(advantage).to(log_p), config.clip
        )
        take_step(student.model, loss, optimizer, schedule)
        losses.append((loss.item(), clipped.item()))
    return losses


def _summary(episodes: Episodes, losses: list[tuple[float, float]]) -> dict[str, float]:
    loss, clipped = np.mean(losses, axis=0)
    lengths = [len(a) for a in episodes.advantage]
    return {
        "q": float(episodes.q.mean()),
        "kl_to_reference": float(episodes.kl.mean()),
        "entropy": float(-np.concatenate(episodes.old_log_p).mean()),
        "response_tokens": float(np.mean(lengths)),
        "missing_eos": float(1.0 - episodes.finished.mean()),
        "loss": float(loss),
        "clip_fraction": float(clipped),
    }


def prompts_of(sequences: Sequence[Encoded], rows: np.ndarray) -> list[tuple[int, ...]]:
    """Line 6 of Algorithm 1: the prompts that the policy used for the states of the given table rows."""
    wanted = set(rows.tolist())
    return [s.tokens[: span.start] for s in sequences for span in _wanted(s, wanted)]


def _wanted(sequence: Encoded, rows: set[int]) -> list[Span]:
    return [span for span in sequence.spans if span.row in rows]
