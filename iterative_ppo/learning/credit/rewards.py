"""ITPO and Norm-ITPO: token log-ratios summed and normalised to turn rewards (Wang et al. 2026, arXiv 2603.23550)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from iterative_ppo.config import CreditConfig
from iterative_ppo.learning.batching import Batch, EncodedTable, response_positions
from iterative_ppo.mdp.returns import backward_recursion
from iterative_ppo.mdp.turn_table import conversation_numbers


@dataclass(frozen=True)
class Turns:
    """Where the tokens of a table's logged suggestions lie in one flat array of T tokens, in table order.

    Attributes:
        first: (N + 1,) each row's first token, and T; a row without a logged suggestion has none.
        conversation: (N,) number of each row's conversation, 0 to C - 1.
        batch: (N,) number of its batch: so many successive conversations, whose scores are normalised together.
    """

    first: np.ndarray
    conversation: np.ndarray
    batch: np.ndarray

    @classmethod
    def of(cls, encoded: EncodedTable, last: np.ndarray, batch_size: int) -> Turns:
        """Of a table of N rows, `last` (N,) its conversations' last ones, in batches of so many conversations."""
        lengths = np.zeros(encoded.rows, np.int64)
        for span in (s for sequence in encoded.sequences for s in sequence.spans if s.trains):
            lengths[span.row] = span.end - span.start
        conversation = conversation_numbers(last)
        return cls(np.append(0, np.cumsum(lengths)), conversation, conversation // batch_size)

    @cached_property
    def lengths(self) -> np.ndarray:
        """(N,) tokens of each row's suggestion, end of sequence included."""
        return np.diff(self.first)

    @cached_property
    def row(self) -> np.ndarray:
        """(T,) row of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def owner(self) -> np.ndarray:
        """(T,) conversation of each token."""
        return self.conversation[self.row]

    @property
    def conversations(self) -> int:
        """C."""
        return int(self.conversation[-1]) + 1 if len(self.conversation) else 0

    @property
    def scored(self) -> np.ndarray:
        """(C,) bool, conversations that hold a logged suggestion."""
        return self.totals(self.lengths) > 0

    def places(self, batch: Batch, spans: np.ndarray) -> np.ndarray:
        """Flat places of the response tokens of a batch's spans."""
        span, _, position = response_positions(batch, spans)
        return np.asarray(self.first[batch.row[span]] + position - batch.start[span])

    def sums(self, values: np.ndarray) -> np.ndarray:
        """(N,) sums of (T,) values over each turn."""
        return np.bincount(self.row, values, len(self.lengths))

    def means(self, values: np.ndarray) -> np.ndarray:
        """(N,) means of (T,) values over each turn, 0 for one without tokens."""
        return np.asarray(self.sums(values) / np.maximum(self.lengths, 1))

    def totals(self, values: np.ndarray) -> np.ndarray:
        """(C,) sums of (N,) values over each conversation."""
        return np.bincount(self.conversation, values, self.conversations)


def turn_rewards(log_ratio: np.ndarray, turns: Turns, outcome: np.ndarray, config: CreditConfig) -> np.ndarray:
    """(N,) u_k of every row; ITPO's are the sums of its tokens' rewards.

    Args:
        log_ratio: (T,) l_t = log phi(y_t | .) - log pi(y_t | .). outcome: (C,) R, which only Norm-ITPO asks for.
    """
    rewards = token_rewards(log_ratio, turns, config.beta)
    if config.assigner == "itpo":
        return turns.sums(rewards)
    return norm_itpo(rewards, turns, outcome, config.temperature)


def token_rewards(log_ratio: np.ndarray, turns: Turns, beta: float) -> np.ndarray:
    """(T,) r_t = beta l_t over the greatest |sum_{s>=t} r_s| of its batch: what is to come of a turn is within 1."""
    scores, batch = beta * log_ratio, turns.batch[turns.row]
    ends = np.append(turns.owner[1:] != turns.owner[:-1], True)[: len(scores)]
    most = np.zeros(turns.conversations)
    np.maximum.at(most, batch, np.abs(backward_recursion(scores, 1.0, ends)))
    return np.asarray(scores / (most[batch] + 1e-6))


def norm_itpo(rewards: np.ndarray, turns: Turns, outcome: np.ndarray, temperature: float) -> np.ndarray:
    """(N,) u_k = R softmax_k(mean_{t in k}(r_t) L / temperature): they sum to the conversation's outcome.

    Of an R below 0, which the paper does not have, those bear the most that helped least. The softmax is over the turns
    of a conversation that have a logged suggestion, L their mean length in the batch.

    Args:
        rewards: (T,) token_rewards. outcome: (C,) R.
    """
    spoken = turns.lengths > 0
    tokens, count = (np.bincount(turns.batch, x, turns.conversations) for x in (turns.lengths, spoken))
    usual = (tokens / np.maximum(count, 1))[turns.batch]
    logit = turns.means(rewards) * usual / temperature * np.where(outcome < 0, -1.0, 1.0)[turns.conversation]
    most = np.full(turns.conversations, -np.inf)
    np.maximum.at(most, turns.conversation[spoken], logit[spoken])
    weight = np.zeros(len(logit))
    weight[spoken] = np.exp(logit[spoken] - most[turns.conversation[spoken]])
    total = np.maximum(turns.totals(weight), 1.0)  # the greatest of a conversation's weights is 1
    return np.asarray((outcome / total)[turns.conversation] * weight)
