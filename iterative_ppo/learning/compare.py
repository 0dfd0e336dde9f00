"""Two policies on the same states: what they say, how far apart they are, and what Q thinks of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from iterative_ppo.learning.batching import EncodedTable
from iterative_ppo.learning.improve.episodes import token_log_probs
from iterative_ppo.learning.language_model import LanguagePolicy, Responses
from iterative_ppo.learning.q_model import QModel
from iterative_ppo.mdp.rendering import single


@dataclass(frozen=True)
class Spoken:
    """Responses of one policy to S states, K each: values and log-probs are (S, K).

    `judged` is what members of Q say that improvement never saw, where it has such judges; else Q itself.
    """

    responses: Responses
    q: np.ndarray
    judged: np.ndarray
    own: np.ndarray
    other: np.ndarray

    @property
    def kl(self) -> float:
        """Monte Carlo KL(own || other), nats a response."""
        return float((self.own - self.other).mean())

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(tokens) for tokens in self.responses.tokens])


def speak(
    policy: LanguagePolicy,
    other: LanguagePolicy,
    q: QModel,
    prompts: Sequence[tuple[int, ...]],
    samples: int,
    seed: int,
) -> Spoken:
    """`samples` responses of `policy` to each prompt, scored by Q and by both policies."""
    repeated = [prompt for prompt in prompts for _ in range(samples)]
    responses = policy.respond(repeated, seed)
    pairs = enumerate(zip(repeated, responses.tokens, strict=True))
    table = EncodedTable([single(k, prompt, tokens, True) for k, (prompt, tokens) in pairs], len(repeated))
    shape = (len(prompts), samples)

    def totals(judge: LanguagePolicy) -> np.ndarray:
        return np.array([log_p.sum() for log_p in token_log_probs(judge, table)]).reshape(shape)

    def last(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([value[-1] for value in values]).reshape(shape)

    values = last(q.running_values(table.sequences))
    judges = isinstance(q, QModel) and q.settings.judges
    judged = last(q.judge_values(table.sequences)) if judges else values
    return Spoken(responses, values, judged, totals(policy), totals(other))
