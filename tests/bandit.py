"""A policy of four words and a Q whose best response is known: what every algorithm must find."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from iterative_ppo.config import Config
from iterative_ppo.learning.batching import EncodedTable
from iterative_ppo.learning.improve.episodes import token_log_probs
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.tiny import build_policy
from iterative_ppo.mdp.conversation import Conversation, Suggestion, Turn
from iterative_ppo.mdp.rendering import Encoded, single

WORDS = ("yes", "no", "maybe", "later")


def build_bandit(config: Config) -> LanguagePolicy:
    """Says one of four words, something else, or nothing; which, it has not learnt yet."""
    turns = tuple(Turn("Hi", (0.0,), Suggestion(word, "suggested"), word, "verbatim") for word in WORDS)
    talk = Conversation("c", (*turns, Turn(None, (0.0,))), "u")
    size = {"hidden_size": 16, "layers": 1, "max_prompt_tokens": 60, "max_response_tokens": 3}
    return build_policy([talk], config.policy.model_copy(update=size), seed=0)


class Taste:
    """A Q that pays by the response, and knows nothing before its end."""

    def __init__(self, reward: Callable[[tuple[int, ...]], float]) -> None:
        self.reward = reward

    def running_values(self, sequences: list[Encoded]) -> list[np.ndarray]:
        values = []
        for s in sequences:
            span = s.spans[0]
            values.append(np.zeros(1 + span.end - span.start))
            values[-1][-1] = self.reward(s.tokens[span.start : span.end])
        return values


class ByPrompt:
    """A Q that tells prompts apart, by their lengths, and no responses to one."""

    def running_values(self, sequences: list[Encoded]) -> list[np.ndarray]:
        return [np.full(1 + s.spans[0].end - s.spans[0].start, float(s.spans[0].start)) for s in sequences]


def said(policy: LanguagePolicy, text: str) -> tuple[int, ...]:
    return policy.renderer.response(Suggestion(text, "suggested"))


def likes(policy: LanguagePolicy, text: str) -> Taste:
    """Q is 1 for one response and 0 for every other: the optimum of E[Q] is 1."""
    liked = said(policy, text)
    return Taste(lambda tokens: float(tokens == liked))


def leans_to(policy: LanguagePolicy, text: str) -> Taste:
    """Q is the share of tokens in their place: 1 for one response alone, and something for nearly every other."""
    liked = said(policy, text)
    return Taste(lambda tokens: sum(a == b for a, b in zip(tokens, liked, strict=False)) / len(liked))


def prompt(policy: LanguagePolicy, *before: str) -> tuple[int, ...]:
    """After a greeting, and after some suggestions before it."""
    ids = policy.renderer.ids
    return (*(i for word in before for i in ids(word)), *ids("<|customer|>"), *ids("Hi"), *ids("<|suggestion|>"))


def probability(policy: LanguagePolicy, text: str) -> float:
    table = EncodedTable([single(0, prompt(policy), said(policy, text), True)], 1)
    return float(np.exp(policy.score(table)[0]))


def distance(policy: LanguagePolicy, champion: LanguagePolicy) -> float:
    """An estimate of KL(policy || champion) in nats a response, from many responses."""
    said_now = policy.respond([prompt(policy)] * 4000, seed=9)
    sequences = [single(k, prompt(policy), tokens, True) for k, tokens in enumerate(said_now.tokens)]
    theirs = token_log_probs(champion, EncodedTable(sequences, len(sequences)))
    return float(np.mean(said_now.logprobs - [p.sum() for p in theirs]))
