"""What a round's data cover of what the policy says, with the conversations that personas led and without them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.evaluation.coverage import beyond_reach, coverage
from iterative_ppo.mdp import turn_table
from tasks.datasets import Dataset, of_policy, served_by

SAMPLED_ROWS = 100_000


def coverage_metrics(config: Config, model: Path, label: str, dataset: Dataset) -> dict[str, float]:
    """Coverage of a policy's held-out actions by the round's fit part; `_own` is what its own conversations cover.

    With personas also how many of the policy's own responses theirs are worth (effective sample size), and the share;
    with them or another arm, how many of their states are beyond what its own conversations tell V of.

    Args:
        model: where the policy is.
        label: what its conversations carry in the turn table.
    """
    every = pd.concat(list(_sampled(dataset, config)), ignore_index=True)
    frame = every[served_by(every, label)].reset_index(drop=True)
    own, fit = of_policy(frame, label), frame["part"] == "fit"
    asked, led = frame[own & ~fit], frame[~own & fit].reset_index(drop=True)
    tables = {"_own": frame[own & fit], "": frame[fit]} if len(led) else {"": frame[fit]}
    metrics: dict[str, float] = {}
    for suffix, table in tables.items():
        found = coverage(asked, table, config.seed)
        if found is not None:
            metrics[f"coverage_distinct_actions{suffix}"] = found.distinct_actions
            metrics[f"coverage_extrapolated{suffix}"] = found.extrapolated
            metrics["coverage_neighbours"] = float(found.neighbours)
    others = every[~of_policy(every, label) & (every["part"] == "fit")].reset_index(drop=True)
    far = beyond_reach(others, frame[own & fit], asked, config.seed) if len(others) else None
    if far is not None:
        metrics["coverage_beyond_reach"] = far
    return metrics | (_worth(config, model, label, dataset) if len(led) else {})


def _sampled(dataset: Dataset, config: Config) -> Iterator[pd.DataFrame]:
    """Blocks of a dataset; of a large one about SAMPLED_ROWS rows, by whole conversations that their ids choose."""
    share = SAMPLED_ROWS / max(turn_table.count_rows(dataset.path), SAMPLED_ROWS)
    for block in dataset.blocks(config):
        number = pd.util.hash_array(block["conversation_id"].to_numpy(dtype=object))
        yield block[number <= share * np.iinfo(np.uint64).max]


def _worth(config: Config, model: Path, label: str, dataset: Dataset) -> dict[str, float]:
    from iterative_ppo.learning.batching import encode_table
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.policy_evaluation import effective_size

    pi = LanguagePolicy.load(model, device=config.runtime.device)
    ratios = []
    for block in dataset.blocks(config):
        rows = served_by(block, label) & ~of_policy(block, label) & (block["part"] == "fit")
        led = block[rows].reset_index(drop=True)
        logged = led["behaviour_logprob"].to_numpy(float, na_value=np.nan)
        ratios.append(pi.score(encode_table(led, pi.renderer)) - logged)
    ratio = np.concatenate(ratios)
    known, size = int((~np.isnan(ratio)).sum()), effective_size(ratio)
    worth = {"coverage_persona_turns": float(known), "coverage_effective_size": size}
    return worth | {"coverage_effective_share": size / max(known, 1)}
