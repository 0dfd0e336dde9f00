"""The implicit process reward model: a language model whose log-ratio to a frozen reference tells the outcome.

Its form is that of Yuan et al. 2024 (arXiv 2412.01981): beta sum_t log phi(y_t | .) / pi(y_t | .), success's logit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from iterative_ppo.config import CreditConfig
from iterative_ppo.errors import TrainingError
from iterative_ppo.learning.batching import Batch, collate, inference_batches
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.credit.rewards import Turns
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.optimization import set_by
from iterative_ppo.learning.policy_evaluation import Round
from iterative_ppo.learning.sequences import Chosen
from iterative_ppo.learning.training import Curve, Progress, train
from iterative_ppo.mdp.rendering import Encoded

Ratios = Iterator[tuple[np.ndarray, np.ndarray]]
"""Flat places of some tokens at a time, and their log-probs or l_t."""


@dataclass(frozen=True)
class Scored:
    """A round's conversations with the log-probs of the frozen reference.

    Attributes:
        places: of each conversation's `sequences`: one, or one a turn where prefixes are not shared.
        outcome: (C,) R, what the conversation's rewards sum to.
        reference: (T,) log pi(y_t | .), -inf for a token that the policy never says.
    """

    turns: Turns
    sequences: Sequence[Encoded]
    places: list[list[int]]
    outcome: np.ndarray
    reference: np.ndarray

    def sequences_of(self, conversations: Iterable[int]) -> Chosen:
        """The sequences of some conversations."""
        return Chosen(self.sequences, np.array([place for k in conversations for place in self.places[k]], dtype=int))

    @classmethod
    def of(cls, policy: LanguagePolicy, data: Round, batch_size: int) -> Scored:
        turns = Turns.of(data.encoded, data.last, batch_size)
        places: list[list[int]] = [[] for _ in range(turns.conversations)]
        for k, sequence in enumerate(data.encoded.sequences):
            places[turns.conversation[sequence.spans[0].row]].append(k)
        reference = np.zeros(len(turns.row))
        for tokens, log_p in token_log_probs(policy, data.encoded.sequences, turns):
            reference[tokens] = log_p
        return cls(turns, data.encoded.sequences, places, turns.totals(data.reward), reference)

    @cached_property
    def said(self) -> np.ndarray:
        """(T,) bool, tokens that the policy may say. The others tell nothing of it and score 0."""
        return np.isfinite(self.reference)

    def log_ratios(self, phi: LanguagePolicy, conversations: Iterable[int]) -> Ratios:
        """l_t of the tokens of some conversations."""
        for places, log_p in token_log_probs(phi, self.sequences_of(conversations), self.turns):
            said = self.said[places]
            yield places, np.subtract(log_p, self.reference[places], out=np.zeros(len(places)), where=said)

    def log_ratio(self, phi: LanguagePolicy) -> np.ndarray:
        """(T,) l_t of all tokens. Raises TrainingError where one is not finite."""
        found = np.zeros(len(self.reference))
        for places, ratio in self.log_ratios(phi, range(len(self.places))):
            found[places] = ratio
        if not np.isfinite(found).all():
            raise TrainingError("the process reward model's scores are not finite; lower credit.learning_rate")
        return found


@torch.inference_mode()
def token_log_probs(policy: LanguagePolicy, sequences: Sequence[Encoded], turns: Turns) -> Ratios:
    """Log-probs of the logged suggestions' tokens."""
    for batch in inference_batches(sequences, policy.inference_tokens, policy.pad):
        spans = np.flatnonzero(batch.trains)
        if len(spans):
            log_p, _ = policy.token_log_probs(batch, spans)
            yield turns.places(batch, spans), log_p.double().cpu().numpy()


def fit(
    phi: LanguagePolicy,
    data: Scored,
    batches: Sequence[np.ndarray],
    unit: np.ndarray,
    config: CreditConfig,
    progress: Progress | None = None,
    after_step: Callable[[Curve], None] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[float]:
    """Train phi in place, one update a batch, on the cross-entropy of sigmoid(beta sum_t l_t) against the outcome.

    Its gradient is (sigmoid - R) beta sum_t grad log phi(y_t | .): a sum over tokens once the first factor is known. So
    each batch is read once for that factor, and may then be learnt from in pieces and in several processes, also where
    a conversation is several sequences.

    Args:
        batches: numbers of the conversations of each. unit: (C,) R scaled to [0, 1].
        checkpoint: where a killed fit goes on from.

    Returns the mean loss of each batch before its update.
    """
    owner, latest = data.turns.owner, 0.0
    pull = np.zeros(data.turns.conversations)

    def after(begun: int) -> Iterator[Batch]:
        nonlocal latest
        for members in batches[begun:]:
            score = np.zeros(len(pull))
            for places, ratio in data.log_ratios(phi, members):
                np.add.at(score, owner[places], config.beta * ratio)
            logit, aim = score[members], unit[members]
            latest = float((np.logaddexp(0.0, logit) - aim * logit).mean())
            pull[members] = config.beta * (np.exp(-np.logaddexp(0.0, -logit)) - aim) / len(members)
            yield collate(data.sequences_of(members), phi.pad)

    def objective(batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        spans = np.flatnonzero(batch.trains)
        log_p, _ = phi.token_log_probs(batch, spans)
        places = data.turns.places(batch, spans)
        said = data.said[places]
        weight = torch.from_numpy(pull[owner[places[said]]]).to(log_p)
        return (weight * log_p[torch.from_numpy(said).to(log_p.device)]).sum(), {}

    def updated(curve: Curve) -> None:
        curve[-1]["cross_entropy"] = latest
        if after_step:
            after_step(curve)

    with set_by("credit.learning_rate"):
        curve = train(phi, after, len(batches), objective, config.learning_rate, progress, checkpoint, updated)
    return [update["cross_entropy"] for update in curve]
