"""Rewards, returns and targets of Q, vectorised over the whole turn table (paper, section 3.1, Observation 2)."""

from __future__ import annotations

import numpy as np
import pandas as pd

from iterative_ppo.errors import ConfigError, TurnTableError
from iterative_ppo.mdp.turn_table import last_rows

ACCEPTANCE = {"verbatim": 1.0, "edited": 0.5, "rejected": 0.0, "no_reply": 0.0}
BLOCK = 1 << 15
"""Rows solved at a time: their band is half a megabyte."""


def rewards(frame: pd.DataFrame, column: str = "outcome") -> np.ndarray:
    """(N,) r_i := o_{i+1}, the outcome on arrival in the next state; 0 in terminal rows, which pay nothing more."""
    outcome = frame[column].to_numpy(dtype=float)
    following = np.append(outcome[1:], 0.0)
    return np.where(last_rows(frame), 0.0, following)


def acceptance_rewards(frame: pd.DataFrame) -> np.ndarray:
    """(N,) the myopic reward of single-turn RLHF: 1 sent verbatim, 1/2 edited, 0 otherwise. A baseline, not our aim."""
    return frame["adoption"].map(ACCEPTANCE).astype(float).fillna(0.0).to_numpy()


def backward_recursion(constant: np.ndarray, coefficient: float | np.ndarray, last: np.ndarray) -> np.ndarray:
    """y_i = constant_i + coefficient_i y_{i+1} within each conversation; y_i = constant_i in its last row.

    The one recursion behind Monte Carlo, lambda- and Retrace returns: an upper bidiagonal system, which BLAS solves in
    one pass of compiled code, a block of rows at a time so that the band stays in the processor's cache.

    Args:
        constant: (N,) or (N, K), finite.
        coefficient: a number, or an array of the constant's shape, finite. Its values in last rows are not used.
        last: (N,) bool, the last row of each conversation.

    Returns an array of the constant's shape. Raises TurnTableError where an input is not finite.
    """
    if constant.ndim == 2:
        columns = np.broadcast_to(coefficient, constant.shape)
        pairs = zip(constant.T, columns.T, strict=True)
        return np.stack([backward_recursion(c, k, last) for c, k in pairs], axis=1).reshape(constant.shape)
    from scipy.linalg.blas import dtbsv

    y = np.array(constant, dtype=float)
    negative = np.broadcast_to(np.negative(coefficient), y.shape)
    band = np.empty((2, min(BLOCK, len(y))), order="F")  # row 1, the diagonal, is 1 and never read
    for end in range(len(y), 0, -BLOCK):
        begin = max(0, end - BLOCK)
        if end < len(y):
            y[end - 1] -= negative[end - 1] * y[end] * (not last[end - 1])
        above = band[:, : end - begin]
        np.multiply(~last[begin : end - 1], negative[begin : end - 1], out=above[0, 1:])
        dtbsv(1, above, y[begin:end], diag=1, overwrite_x=1)
    if len(y) and not np.isfinite(y[0]):  # 0 times what is no number is none, so it reaches the first row
        raise TurnTableError("rewards, values and log-ratios must be finite numbers; validate the turn table")
    return y


def discounted_returns(reward: np.ndarray, last: np.ndarray, gamma: float) -> np.ndarray:
    """G_i = sum_{j>=0} gamma^j r_{i+j} within each conversation.

    Args:
        reward: (N,) or (N, K) rewards in table order.
        last: (N,) bool, the last row of each conversation.
        gamma: discount in (0, 1).

    Raises ConfigError for gamma outside [0, 1).
    """
    return backward_recursion(reward, _discount(gamma), last)


def following(values: np.ndarray, last: np.ndarray) -> np.ndarray:
    """x_{i+1} of (N,) or (N, K) values, 0 where the next row is terminal; NaN stays where a value is unknown."""
    after = np.zeros(values.shape)
    after[:-1] = values[1:]
    ends = last.copy()
    ends[:-1] |= last[1:]
    after[ends] = 0.0
    return after


def lambda_returns(
    reward: np.ndarray, last: np.ndarray, values: np.ndarray, gamma: float, trace_decay: float
) -> np.ndarray:
    """G^l_i = r_i + gamma (1 - d_i) [(1 - l) x_{i+1} + l G^l_{i+1}] (Sutton and Barto 2018, Eq. 12.2, recursively).

    Args:
        reward: (N,) or (N, K) r_i. last: (N,) last rows of conversations, which are terminal.
        values: like `reward`, x_i: Q(s_i, a_i) of the logged actions, or V(s_i). Where it is NaN, because an action
            was not logged, the return goes on in its place.
        trace_decay: l in [0, 1]; 0 is SARSA (or, with V, one step), 1 is Monte Carlo.
    """
    ahead = following(values, last)
    known = np.isfinite(ahead)
    constant = reward + _discount(gamma) * (1.0 - trace_decay) * np.where(known, ahead, 0.0)
    return backward_recursion(constant, gamma * np.where(known, trace_decay, 1.0), last)


def one_step_targets(reward: np.ndarray, last: np.ndarray, v: np.ndarray, gamma: float) -> np.ndarray:
    """y_i = r_i + gamma V(s_{i+1}), V(terminal) = 0: Q^pi of any logged action, whoever chose it.

    Args:
        reward: (N,) or (N, K) r_i. last: (N,) last rows of conversations.
        v: V(s_i), NaN in terminal rows, and where no action was logged: there y_{i+1} stands in its place.
    """
    return lambda_returns(reward, last, v, gamma, trace_decay=0.0)


def retrace_targets(
    reward: np.ndarray,
    last: np.ndarray,
    q: np.ndarray,
    v: np.ndarray,
    log_ratio: np.ndarray,
    gamma: float,
    trace_decay: float,
) -> np.ndarray:
    """Q(s_i, a_i) + sum_{j>=i} gamma^{j-i} (prod_{l=i+1..j} c_l) delta_j (Munos et al. 2016, arXiv 1606.02647, Eq. 4).

    c_l = trace_decay min(1, rho_l), delta_j = r_j + gamma (1 - d_j) E_pi Q(s_{j+1}, .) - Q(s_j, a_j). Where no action
    was logged the business acted by itself, as it would under pi: the sums go on to the next row that has one.

    Args:
        reward: (N,) or (N, K) r_i. last: (N,) last rows of conversations, which are terminal.
        q: like `reward`, Q(s_i, a_i), NaN where no action was logged.
        v: like `reward`, E_pi Q(s_i, .) where an action was logged.
        log_ratio: (N,) log rho_i = log pi(a_i | s_i) - log b(a_i | s_i) of whole responses; of a logged action, NaN
            sets c_i to 0.

    Returns targets like `reward`, NaN where no action was logged.
    """
    trace = trace_decay * np.exp(np.minimum(0.0, np.where(np.isnan(log_ratio), -np.inf, log_ratio)))
    trace = np.where(np.isnan(q), 1.0, trace if q.ndim == 1 else trace[:, None])
    known = np.where(np.isnan(q), 0.0, v - trace * q)
    constant = reward + _discount(gamma) * following(known, last)
    return np.where(np.isnan(q), np.nan, backward_recursion(constant, gamma * following(trace, last), last))


def _discount(gamma: float) -> float:
    if not 0.0 <= gamma < 1.0:
        raise ConfigError(f"gamma is {gamma}, expected 0 <= gamma < 1")
    return gamma


def monte_carlo(frame: pd.DataFrame, gamma: float, column: str = "outcome") -> np.ndarray:
    """(N,) G_i of every row of a turn table, of the weighted outcome or of one named outcome column."""
    return discounted_returns(rewards(frame, column), last_rows(frame), gamma)
