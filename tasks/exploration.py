"""What a round's data cover of what the policy says, with the conversations that personas led and without them."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from iterative_ppo.config import Config
from iterative_ppo.evaluation.coverage import coverage
from tasks.datasets import Dataset, of_policy, served_by


def coverage_metrics(config: Config, model: Path, label: str, dataset: Dataset) -> dict[str, float]:
    """Coverage of a policy's held-out actions by the round's fit part; `_own` is what its own conversations cover.

    With personas also how many of the policy's own responses theirs are worth (effective sample size), and the share.

    Args:
        model: where the policy is.
        label: what its conversations carry in the turn table.
    """
    frame = dataset.read(config)
    frame = frame[served_by(frame, label)].reset_index(drop=True)
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
    return metrics | (_worth(config, model, led) if len(led) else {})


def _worth(config: Config, model: Path, led: pd.DataFrame) -> dict[str, float]:
    import numpy as np

    from iterative_ppo.learning.batching import encode_table
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.policy_evaluation import effective_size

    pi = LanguagePolicy.load(model, device=config.runtime.device)
    ratio = pi.score(encode_table(led, pi.renderer)) - led["behaviour_logprob"].to_numpy(float, na_value=np.nan)
    known = int(np.isfinite(ratio).sum())
    size = effective_size(ratio) if known else 0.0
    worth = {"coverage_persona_turns": float(known), "coverage_effective_size": size}
    return worth | {"coverage_effective_share": size / max(known, 1)}
