"""How well a log covers what the policy says: distinct actions among like states, and where Q can only extrapolate.

States are alike by the words of the last two messages (cosine of TF-IDF), actions by the words that they share; in
scripts that part no words by spaces each letter is one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import pandas as pd

from iterative_ppo.evaluation.degeneration import UNSPACED
from iterative_ppo.mdp.turn_table import actions

NEIGHBOURS, STATES, LOGGED_AT_MOST, ALIKE = 20, 500, 20_000, 0.5
USUAL = 0.95
"""Share of a policy's own held-out states that are counted as within reach of what V was fitted to."""
_WORD = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]")


@dataclass(frozen=True)
class Coverage:
    """Of some states and what the policy said in them, each beside the nearest logged states.

    Attributes:
        states: how many were looked at. neighbours: logged states beside each.
        distinct_actions: mean number of different actions among the neighbours' own.
        extrapolated: share of states in which none of those shares half of its words with what the policy said.
    """

    states: int
    neighbours: int
    distinct_actions: float
    extrapolated: float


def coverage(asked: pd.DataFrame, logged: pd.DataFrame, seed: int = 0) -> Coverage | None:
    """None where either holds no action.

    Args:
        asked: whole conversations of the policy itself, as a turn table; its actions are what Q will be asked about.
        logged: conversations that Q was fitted on, whoever led them. Larger tables are sampled, to bound the memory.
    """
    rng = np.random.default_rng(seed)
    theirs, mine = (_chosen(frame, count, rng) for frame, count in ((logged, LOGGED_AT_MOST), (asked, STATES)))
    if not len(theirs) or not len(mine):
        return None
    count = min(NEIGHBOURS, len(theirs))
    ((_, found),) = _nearest(theirs["state"], count, mine["state"])
    said = theirs["action"].to_numpy()[found]
    known = [any(_alike(own, other) for other in row) for own, row in zip(mine["action"], said, strict=True)]
    distinct = np.mean([len(set(row)) for row in said])
    return Coverage(len(mine), count, float(distinct), 1.0 - float(np.mean(known)))


def beyond_reach(others: pd.DataFrame, fitted: pd.DataFrame, held_out: pd.DataFrame, seed: int = 0) -> float | None:
    """Share of others' states that are farther from V's than all but a twentieth of the policy's own held-out ones.

    One-step targets take V's word in states that other policies reached. What V is worth there no return of theirs
    tells, for they went on otherwise; so this tells how far from its own conversations it is asked. About .05 is as
    near as its own. None where one of the tables holds no action.

    Args:
        others: conversations of other policies, personas or arms. fitted, held_out: the policy's own.
    """
    rng = np.random.default_rng(seed)
    given = ((fitted, LOGGED_AT_MOST), (held_out, STATES), (others, STATES))
    known, own, asked = (_chosen(frame, count, rng)["state"] for frame, count in given)
    if not (len(known) and len(own) and len(asked)):
        return None
    usual, far = (distance[:, 0] for distance, _ in _nearest(known, 1, own, asked))
    return float(np.mean(far > np.quantile(usual, USUAL) + 1e-9))


def _nearest(known: pd.Series, count: int, *asked: pd.Series) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each series of A states the cosine distances (A, count) to the nearest known ones, and which those are."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    words = TfidfVectorizer(token_pattern=_WORD.pattern)
    nearest = NearestNeighbors(n_neighbors=count, metric="cosine").fit(words.fit_transform(known))
    return [nearest.kneighbors(words.transform(states)) for states in asked]


def _chosen(frame: pd.DataFrame, count: int, rng: np.random.Generator) -> pd.DataFrame:
    """State and action of at most `count` rows, shuffled: among equally near states none comes first by its place."""
    rows = np.flatnonzero(actions(frame))
    rows = rows[rng.permutation(len(rows))[:count]]
    before = frame.groupby("conversation_id", sort=False)["business_message"].shift().fillna("").iloc[rows]
    chosen = frame.iloc[rows]
    state = before.astype(object) + " | " + chosen["customer_message"].fillna("").astype(object)
    return pd.DataFrame({"state": state.str.lower(), "action": chosen["suggestion"].astype(object).map(_words)})


def _words(text: object) -> frozenset[str]:
    return frozenset(_WORD.findall(text.lower())) if isinstance(text, str) else frozenset()


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether two actions share half of their words; an abstention is like another alone."""
    return one == other or len(one & other) >= ALIKE * len(one | other)
