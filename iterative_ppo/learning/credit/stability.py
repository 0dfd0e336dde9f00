"""How steady the ranks of turn and token scores are while the process reward model learns, and what they tell."""

from __future__ import annotations

import numpy as np
import torch

from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.credit.process_reward import Scored
from iterative_ppo.learning.credit.rewards import Turns
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.training import Curve

LOOKS, CONVERGED = 10, 3
"""Looks at the scores over the updates, evenly apart; the mean of the last few counts as converged."""
MOST = 64
"""Conversations looked at."""


class Watch:
    """Scores of some conversations at a few updates.

    Args:
        conversations: numbers of those to look at. steps: updates in all.
        kept: where a killed fit finds what was seen.

    Attributes:
        places: (n,) of the conversations' tokens. seen: (n,) their l_t, by the number of updates made.
    """

    def __init__(
        self, phi: LanguagePolicy, data: Scored, conversations: np.ndarray, steps: int, kept: Checkpoint | None = None
    ) -> None:
        self.phi, self.data, self.conversations, self.kept = phi, data, conversations, kept
        self.due = set(np.linspace(1, steps, LOOKS).round().astype(int).tolist())
        self.places = np.flatnonzero(np.isin(data.turns.owner, conversations))
        before = kept.load() if kept else None
        self.seen = {int(name): scores.numpy() for name, scores in before[0].items()} if before else {}

    def look(self, curve: Curve) -> None:
        """After an update, where one is due that was not seen before a kill."""
        if (updates := len(curve)) not in self.due - self.seen.keys():
            return
        found = np.zeros(len(self.data.reference))
        for places, ratio in self.data.log_ratios(self.phi, self.conversations):
            found[places] = ratio
        self.seen[updates] = found[self.places]
        if self.kept:
            self.kept.save({str(k): torch.from_numpy(scores) for k, scores in self.seen.items()}, {})

    def figures(self) -> dict[str, float]:
        """Rank stability of turn and of token scores; empty where there were too few looks or conversations."""
        turns = self.data.turns
        if len(self.seen) <= CONVERGED or not len(self.conversations):
            return {}
        scores = np.zeros((len(self.seen), len(turns.row)))
        scores[:, self.places] = [self.seen[k] for k in sorted(self.seen)]
        rows = np.unique(turns.row[self.places])
        by_turn = np.array([turns.means(one)[rows] for one in scores])
        return {
            "credit_turn_rank_stability": rank_stability(by_turn, turns.conversation[rows]),
            "credit_token_rank_stability": rank_stability(scores[:, self.places], turns.owner[self.places]),
        }


def watched(turns: Turns, among: np.ndarray) -> np.ndarray:
    """Numbers of conversations of `among` (C,) bool whose turns can be ranked, the first MOST of them."""
    several = turns.totals(turns.lengths > 0) > 1
    return np.flatnonzero(among & several)[:MOST]


def rank_stability(scores: np.ndarray, group: np.ndarray) -> float:
    """Mean Spearman correlation, within each group, of earlier scores with the converged ones (the paper's figure 3).

    Args:
        scores: (looks, n). The mean of the last CONVERGED looks is what the others are held against.
        group: (n,) conversation of each score, adjacent. Groups whose scores are all equal are left out.
    """
    from scipy.stats import rankdata

    bounds = np.flatnonzero(np.diff(group)) + 1
    aim, earlier = scores[-CONVERGED:].mean(axis=0), scores[:-CONVERGED]
    found = []
    for part in np.split(np.arange(len(group)), bounds):
        ranks = rankdata(np.vstack([aim[part], earlier[:, part]]), axis=1)
        varied = ranks[1:][np.ptp(ranks[1:], axis=1) > 0]
        if np.ptp(ranks[0]) > 0:
            found += [np.corrcoef(ranks[0], one)[0, 1] for one in varied]
    return float(np.mean(found)) if found else float("nan")


def kendall_tau(score: np.ndarray, outcome: np.ndarray) -> float:
    """Kendall's tau-b; NaN where either does not vary."""
    from scipy.stats import kendalltau

    if len(score) < 2 or np.ptp(score) == 0 or np.ptp(outcome) == 0:
        return float("nan")
    return float(kendalltau(score, outcome).statistic)
