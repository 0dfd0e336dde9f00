"""Sampled responses and what they are worth: token rewards, values, advantages (Schulman et al., arXiv 1506.02438).

Token gamma is 1. The reward is Q(s, a) at the last token and -beta (log pi - log pi_ref) at each; V = 0 after the end.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch

from iterative_ppo.config import PPOConfig
from iterative_ppo.errors import ModelError, NothingToLearn, SameReward, TrainingError
from iterative_ppo.learning import distributed, loading, runtime, sharding
from iterative_ppo.learning.batching import EncodedTable, inference_batches
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.q_model import QModel
from iterative_ppo.learning.sequences import Beginnings, Prompts, prompt_lengths
from iterative_ppo.mdp.rendering import Encoded, single

SAME_REWARD = "Q gives all responses to a prompt the same reward: nothing to improve; the round is rejected"
SAME_RESPONSE = (
    "the policy gives each prompt one response alone, so Q has nothing to choose from; the round is rejected: raise "
    "policy.temperature, or improve.best_of_n.temperature where that is low"
)
NO_NUMBER = "Q gave a reward that is not a number; the round is rejected"


def differ(groups: Iterable[Sequence[Sequence[int]]]) -> bool:
    """Whether there are two responses in some group that are not the same."""
    return any(len(set(map(tuple, group))) > 1 for group in groups)


def nothing_differs(various: bool) -> SameReward:
    """What to raise where no reward of a group's responses differs: Q's fault where they are `various`, or not."""
    return SameReward(SAME_REWARD if various else SAME_RESPONSE)


class RewardModel(Protocol):
    """The frozen Q, as improvement sees it."""

    def running_values(self, sequences: Sequence[Encoded]) -> list[np.ndarray]:
        """(1 + length,) a sequence: V(s), the values after each token of the response, Q(s, a) last."""


def judge_of(q: RewardModel) -> QModel | None:
    """The Q of which some members judge what the others improve; None where it has none."""
    return q if isinstance(q, QModel) and q.settings.judges else None


def unrewarded(
    table: EncodedTable, log_p: Sequence[np.ndarray], q: RewardModel, champion: LanguagePolicy | None
) -> dict[str, float]:
    """Figures of a rollout that nothing is paid by: KL to the champion, in nats a response, and what judges say.

    Args:
        log_p: of each response's tokens, by the policy that said them.
    """
    found = {}
    if champion is not None:
        theirs = token_log_probs(champion, table)
        gaps = [(mine - other).sum() for mine, other in zip(log_p, theirs, strict=True)]
        found["kl_to_champion"] = float(np.mean(gaps))
    if judge := judge_of(q):
        values = distributed.by_shares(table.sequences, judge.judge_values)
        found["judge"] = float(np.mean([value[-1] for value in values]))
    return found


def check_prompts(policy: LanguagePolicy, prompts: Prompts) -> None:
    """Raise TrainingError where there is no prompt, ModelError where one leaves its response no room in the context."""
    if not prompts:
        raise TrainingError("no prompt to improve on")
    context, steady = loading.context(policy.model), loading.steady_context(policy.model)
    limit, room = steady or context, policy.settings.max_response_tokens
    what = "first LongRoPE range" if steady else "context"
    lengths = prompt_lengths(prompts)
    longest = int(lengths.argmax())
    if limit and lengths[longest] + room > limit:
        raise ModelError(
            f"prompt {longest} has {lengths[longest]} tokens, which with a response of {room} "
            f"(policy.max_response_tokens) is more than the model's {what} of {limit}; shorten the prompt"
        )


@dataclass(frozen=True)
class Episodes:
    """Sampled responses, one sequence each.

    Per episode (N,): Q, KL in both directions to the reference. `spread` is the greatest difference that the tokens of
    one response make to its running value. Per token, in lists of (length,): log-probs as sampled and of the reference,
    value, advantage as GAE left it, and the return that a critic learns.
    """

    table: EncodedTable
    q: np.ndarray
    spread: float
    kl: np.ndarray
    reverse_kl: np.ndarray
    finished: np.ndarray
    old_log_p: list[np.ndarray]
    value: list[np.ndarray]
    advantage: list[np.ndarray]
    returns: list[np.ndarray]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.advantage))

    @property
    def responses(self) -> list[tuple[int, ...]]:
        """Their tokens."""
        return [s.tokens[s.spans[0].start : s.spans[0].end] for s in self.table.sequences]

    def whitened(self) -> list[np.ndarray]:
        """Advantages with mean 0 and variance 1 over all response tokens."""
        flat = np.concatenate(self.advantage)
        return [(a - flat.mean()) / (flat.std() + 1e-8) for a in self.advantage]


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


def response_rewards(
    values: Sequence[np.ndarray], finished: np.ndarray, scale: float, missing_eos_penalty: float
) -> np.ndarray:
    """(N,) Q(s, a) / scale at the last token, minus the penalty where the response reached the length limit.

    A response cut at the limit gets Q of what it wrote and its penalty, never a bootstrap from a value beyond it.
    """
    q = np.array([value[-1] for value in values]) / scale
    return q - np.where(finished, 0.0, missing_eos_penalty)


def kl_both_ways(log_p: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Estimates, in nats, of KL(pi || ref) and KL(ref || pi) summed over the tokens of one response sampled from pi.

    The first is the sum of log-ratios. The second weighs each token by rho = ref / pi: rho log rho - (rho - 1), never
    negative (http://joschu.net/blog/kl-approx.html); it is of the states that pi visits.
    """
    log_rho = np.clip(reference - log_p, -20.0, 20.0)
    rho = np.exp(log_rho)
    return float((log_p - reference).sum()), float((rho * log_rho - (rho - 1.0)).sum())


def token_log_probs(policy: LanguagePolicy, table: EncodedTable) -> list[np.ndarray]:
    """Per single-turn sequence: (length,) log pi of its response tokens."""
    with sharding.gathered(policy.model):
        return distributed.by_shares(table.sequences, partial(_token_log_probs, policy))


@torch.inference_mode()
def _token_log_probs(policy: LanguagePolicy, sequences: Sequence[Encoded]) -> list[np.ndarray]:
    found: dict[int, np.ndarray] = {}
    for batch in inference_batches(sequences, policy.inference_tokens, policy.pad):
        spans = np.arange(len(batch.row))
        log_p, index = policy.token_log_probs(batch, spans)
        parts = np.split(log_p.cpu().numpy(), np.flatnonzero(np.diff(index.cpu().numpy())) + 1)
        found |= dict(zip(batch.row.tolist(), parts, strict=True))
    return [found[sequence.spans[0].row] for sequence in sequences]


def roll_out(
    policy: LanguagePolicy,
    reference: LanguagePolicy | None,
    q: RewardModel,
    prompts: Prompts,
    config: PPOConfig,
    scale: float,
    seed: int,
    beta: float | None = None,
    critic: RewardModel | None = None,
) -> Episodes:
    """Sample one response a prompt and compute its token rewards and advantages.

    Log-probs are those of sampling; in bfloat16, where a key-value cache rounds otherwise than the training's own
    pass, they are computed again.

    Args:
        reference: None means the policy itself, as it is before its first update.
        beta: the KL penalty's coefficient; None means the configured one.
        critic: whose running values are V, already over `scale`; None means those of Q.

    Raises TrainingError where Q is not a number.
    """
    responses = policy.respond(prompts, seed)
    sequences = [
        single(k, prompt, tokens, True)
        for k, (prompt, tokens) in enumerate(zip(prompts, responses.tokens, strict=True))
    ]
    table = EncodedTable(sequences, len(sequences))
    q_values = distributed.by_shares(sequences, q.running_values)
    reward = response_rewards(q_values, responses.finished, scale, config.missing_eos_penalty)
    if not np.isfinite(reward).all():
        raise NothingToLearn(NO_NUMBER)
    if critic:
        values = distributed.by_shares(sequences, critic.running_values)
    else:
        values = [value / scale for value in q_values]
    old = token_log_probs(policy, table) if runtime.current().bfloat16 else responses.token_logprobs
    anchor = old if reference is None else token_log_probs(reference, table)
    beta = config.kl_coefficient if beta is None else beta
    advantages, kls = [], []
    for k, (log_p, ref) in enumerate(zip(old, anchor, strict=True)):
        token_reward = -beta * (log_p - ref)
        token_reward[-1] += reward[k]
        kls.append(kl_both_ways(log_p, ref))
        advantages.append(gae(token_reward, values[k][:-1], config.gae_lambda))
    before = [value[:-1] for value in values]
    kl, reverse = np.array(kls).T
    return Episodes(
        table,
        np.array([value[-1] for value in q_values]),
        float(max(np.ptp(value) for value in q_values)),
        kl,
        reverse,
        responses.finished,
        old,
        before,
        advantages,
        [a + v for a, v in zip(advantages, before, strict=True)],
    )


def prompts_of(sequences: Sequence[Encoded], rows: np.ndarray) -> Beginnings:
    """Line 6 of Algorithm 1: the prompts that the policy used for the states of the given table rows."""
    wanted = set(rows.tolist())
    found = [(k, span.start) for k, s in enumerate(sequences) for span in s.spans if span.row in wanted]
    places, lengths = np.array(found, dtype=np.int64).reshape(-1, 2).T
    return Beginnings(sequences, places, lengths)
