"""Monte Carlo returns G_i, vectorised over the whole turn table (paper, section 3.1, Observation 2)."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pandas as pd

from iterative_ppo.errors import ConfigError
from iterative_ppo.mdp.turn_table import last_rows

ACCEPTANCE = {"verbatim": 1.0, "edited": 0.5, "rejected": 0.0, "no_reply": 0.0}


def rewards(frame: pd.DataFrame, column: str = "outcome") -> np.ndarray:
    """(N,) r_i := o_{i+1}, the outcome on arrival in the next state; 0 in terminal rows, which pay nothing more."""
    outcome = frame[column].to_numpy(dtype=float)
    following = np.append(outcome[1:], 0.0)
    return np.where(last_rows(frame), 0.0, following)


def acceptance_rewards(frame: pd.DataFrame) -> np.ndarray:
    """(N,) the myopic reward of single-turn RLHF: 1 sent verbatim, 1/2 edited, 0 otherwise. A baseline, not our aim."""
    return frame["adoption"].map(ACCEPTANCE).astype(float).fillna(0.0).to_numpy()


def discounted_returns(reward: np.ndarray, last: np.ndarray, gamma: float) -> np.ndarray:
    """G_i = sum_{j>=0} gamma^j r_{i+j} within each conversation.

    Args:
        reward: (N,) rewards in table order.
        last: (N,) bool, the last row of each conversation.
        gamma: discount in (0, 1).

    The rows are visited by their distance from the end, all conversations at once, so the number of numpy passes is
    the longest conversation's length and not the number of rows. Raises ConfigError for gamma outside [0, 1).
    """
    if not 0.0 <= gamma < 1.0:
        raise ConfigError(f"gamma is {gamma}, expected 0 <= gamma < 1")
    returns = reward.astype(float, copy=True)
    distance = distance_to_end(last)
    order = np.argsort(distance, kind="stable")
    bounds = np.searchsorted(distance[order], np.arange(1, distance.max(initial=0) + 2))
    for begin, end in pairwise(bounds):
        rows = order[begin:end]
        returns[rows] += gamma * returns[rows + 1]
    return returns


def distance_to_end(last: np.ndarray) -> np.ndarray:
    """(N,) int: how many rows of the same conversation follow each row."""
    rows = np.arange(len(last))
    ends = np.flatnonzero(last)
    return ends[np.searchsorted(ends, rows)] - rows if len(ends) else rows


def monte_carlo(frame: pd.DataFrame, gamma: float, column: str = "outcome") -> np.ndarray:
    """(N,) G_i of every row of a turn table, of the weighted outcome or of one named outcome column."""
    return discounted_returns(rewards(frame, column), last_rows(frame), gamma)
