"""Algorithm 1 on tables: the twins of the language-model steps, for proofs on the enumerable chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from iterative_ppo.environments.chain import ACTIONS, Chain, greedy
from iterative_ppo.mdp.returns import monte_carlo
from iterative_ppo.mdp.turn_table import actions, to_frame

OUTCOMES = {"purchase": 1.0}
EVIDENCE_SHARE = 0.2

Improvement = Callable[[np.ndarray, np.ndarray], np.ndarray]


def softmax_improvement(policy: np.ndarray, q: np.ndarray, beta: float = 0.03) -> np.ndarray:
    """(S, A) pi' ~ pi exp(Q / beta), the maximiser of E_pi'[Q] - beta KL(pi' || pi): what PPO's penalty aims at."""
    with np.errstate(divide="ignore"):
        logits = np.log(policy) + q / beta
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def greedy_improvement(policy: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(S, A) argmax_a Q(s, a) among the actions that `policy` covers: Observation 1's greedy policy."""
    return greedy(np.where(policy > 0, q, -np.inf))


def epsilon_greedy_improvement(policy: np.ndarray, q: np.ndarray, epsilon: float = 0.2) -> np.ndarray:
    """(S, A) greedy, with `epsilon` spread over all actions so that each stays covered."""
    return (1 - epsilon) * greedy(q) + epsilon / q.shape[1]


def pairs(chain: Chain, frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """((N,) states, (N,) actions) of the N rows of a turn table that have an action."""
    rows = frame[actions(frame)]
    codes, messages = pd.factorize(rows["customer_message"])
    chosen, texts = pd.factorize(rows["suggestion"])
    states = np.array([chain.state_of(message) for message in messages], dtype=int)
    return states[codes], np.array([ACTIONS.index(text) for text in texts], dtype=int)[chosen]


def mean_per_pair(chain: Chain, frame: pd.DataFrame, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((S, A) means of `values` (N,), 0 where there is none; (S, A) numbers of rows)."""
    shape = chain.reward.shape
    cell = np.ravel_multi_index(pairs(chain, frame), shape)
    count = np.bincount(cell, minlength=chain.reward.size).reshape(shape)
    total = np.bincount(cell, weights=values, minlength=chain.reward.size).reshape(shape)
    return total / np.maximum(count, 1), count


@dataclass
class TabularSteps:
    """iterative_ppo.algorithm.Steps with tables: Policy = Q = (S, A), Data = turn table, Prompts = visited states."""

    chain: Chain = field(default_factory=Chain.default)
    gamma: float = 0.95
    conversations: int = 20_000
    seed: int = 0
    improvement: Improvement = softmax_improvement
    max_rounds: int = 5
    tolerance: float = 0.0
    prior_visits: float = 10.0
    history: list[np.ndarray] = field(default_factory=list)
    """Q of each finished round."""

    def initialize(self) -> np.ndarray:
        return self.chain.uniform()

    def collect(self, policy: np.ndarray) -> pd.DataFrame:
        """Fresh conversations of `policy`; the seed differs with the round."""
        seed = 1000 * self.seed + len(self.history)
        return to_frame(self.chain.sample(policy, self.conversations, seed), OUTCOMES, EVIDENCE_SHARE)

    def fit_q(self, policy: np.ndarray, data: pd.DataFrame) -> np.ndarray:
        """(S, A) mean of G, drawn to the state's mean by `prior_visits`: two lucky visits are no reason to commit."""
        returns = monte_carlo(data, self.gamma)[actions(data)]
        mean, count = mean_per_pair(self.chain, data, returns)
        visits = np.maximum(count.sum(axis=1, keepdims=True), 1)
        value = (mean * count).sum(axis=1, keepdims=True) / visits
        return (mean * count + self.prior_visits * value) / np.maximum(count + self.prior_visits, 1)

    def prompts(self, policy: np.ndarray, data: pd.DataFrame) -> np.ndarray:
        return np.unique(pairs(self.chain, data)[0])

    def improve(self, policy: np.ndarray, prompts: np.ndarray, q: np.ndarray) -> np.ndarray:
        """The improvement in the visited states; elsewhere the policy stays as it is."""
        improved = policy.copy()
        improved[prompts] = self.improvement(policy[prompts], q[prompts])
        return improved

    def converged(self, q: np.ndarray, policy: np.ndarray, data: pd.DataFrame) -> bool:
        """Whether the visited pairs' mean |Q_i - Q_{i-1}| is within `tolerance`, or `max_rounds` are done."""
        previous = self.history[-1] if self.history else np.full_like(q, np.inf)
        self.history.append(q)
        change = float(np.abs(q - previous)[pairs(self.chain, data)].mean())
        return change <= self.tolerance or len(self.history) >= self.max_rounds
