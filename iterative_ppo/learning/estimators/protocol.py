"""What an estimator of Q^pi is, what it knows of the log, and what it fits: a network, or a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from iterative_ppo.learning.q_model import Values
from iterative_ppo.mdp.returns import discounted_returns
from iterative_ppo.mdp.turn_table import conversation_numbers

Schedule = Literal["value", "q"]
"""Which of the two training schedules a fit uses: that of a Monte Carlo V, or that of Q."""


@dataclass(frozen=True)
class Transitions:
    """Logged turns of all policies, flat, in table order; H columns where Q has H heads.

    Attributes:
        reward: (N, H) r_i. returns: (N, H) G_i. last: (N,) last rows of conversations, which are terminal.
        own: (N,) rows of pi's own conversations. fit: (N,) rows that may be learnt from. logged: (N,) with an action.
        log_ratio: (N,) log rho_i = log pi(a_i | s_i) - log b(a_i | s_i), NaN where not known, -inf where pi never
            says it.
    """

    reward: np.ndarray
    returns: np.ndarray
    last: np.ndarray
    own: np.ndarray
    fit: np.ndarray
    logged: np.ndarray
    log_ratio: np.ndarray
    gamma: float

    def of_fit(self, values: np.ndarray) -> np.ndarray:
        """(N, H) values of the rows that may be learnt from, NaN elsewhere."""
        return np.where(self.fit[:, None], values, np.nan)

    def of_own(self, values: np.ndarray) -> np.ndarray:
        """(N, H) values of pi's own rows among them: what tells of Q^pi without a correction."""
        return np.where((self.fit & self.own)[:, None], values, np.nan)

    @property
    def conversation(self) -> np.ndarray:
        """(N,) number of each row's conversation, 0 to C - 1."""
        return conversation_numbers(self.last)

    @property
    def outcomes(self) -> np.ndarray:
        """(C, H) what each conversation's rewards sum to, without discount."""
        return np.stack([np.bincount(self.conversation, column) for column in self.reward.T], axis=1)

    @property
    def behaviour_returns(self) -> np.ndarray:
        """(N, H) returns of every policy's rows: of the behaviour's Q, where an off-policy estimator starts."""
        return self.of_fit(discounted_returns(self.reward, self.last, self.gamma))


@dataclass(frozen=True)
class Features:
    """phi(s_i, a_i) and E_pi phi(s_i, .), both (N, F), 0 in rows without a logged action."""

    logged: np.ndarray
    expected: np.ndarray


class Learner(Protocol):
    """An approximation of Q^pi and V^pi that can be fitted to targets of the log's rows.

    It learns where an action was logged, and tells no value elsewhere: targets go on over such rows.
    """

    def copy(self) -> Learner:
        """One that starts the same and is fitted apart."""

    def values(self) -> Values:
        """(N, H) V(s_i) and Q(s_i, a_i), NaN where no action was logged."""

    def expected(self) -> np.ndarray:
        """(N, H) E_pi Q(s_i, .), exactly or by samples of pi; NaN where no action was logged."""

    def fit(
        self,
        q: np.ndarray,
        v: np.ndarray | None = None,
        schedule: Schedule = "q",
        share: float = 1.0,
        target: Learner | None = None,
        expectile: float | None = None,
    ) -> None:
        """Regress on (N, H) targets of Q and of V (None: the mean of Q's), leaving out rows with NaN in `q`.

        Args:
            share: of the schedule's passes.
            target: a network that follows with each step (Polyak averaging).
            expectile: V learns this expectile of its targets; None is their mean, as .5 is.
        """

    def features(self) -> Features:
        """Features in which Q is linear. Raises TrainingError where there are none."""

    def weights(self) -> np.ndarray:
        """(N, H) weight of each row for each head."""

    def solve(self, weights: np.ndarray) -> None:
        """Set Q to `features` @ weights (F, H), and V to its mean under pi."""


class Estimator(Protocol):
    """A way to fit Q^pi from a log."""

    @property
    def own_only(self) -> bool:
        """Whether it learns from pi's own conversations alone."""

    @property
    def iterations(self) -> int | None:
        """How often it is fitted to targets from itself, at least once a turn of a conversation; None where never."""

    @property
    def needs_ratios(self) -> bool:
        """Whether it weighs rows by rho, and so needs the behaviour's log-probs."""

    @property
    def off_policy(self) -> bool:
        """Whether it bootstraps from the policy's own actions, and so asks for support of them in the log."""

    def fit(self, learner: Learner, data: Transitions) -> None:
        """Fit `learner` to Q^pi."""
