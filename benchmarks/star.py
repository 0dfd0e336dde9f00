"""`make bench-star`: the importers' counts, and Q's held-out AUC on STAR beside a TF-IDF regression, same split."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.q_cells import FITTED, cell, sections
from benchmarks.results_file import at_least, averaged, figure, write
from iterative_ppo.config import Config, load_config
from iterative_ppo.evaluation.metrics import auc
from iterative_ppo.files import content_hash
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from tasks.traffic import LOGGED, to_rows

WORK = Path(__file__).parent / "work" / "star"
PARTS = {"all turns": 0, "at 4 messages": 2, "at 8 messages": 4}
"""The turn in which the state and the suggestion are that many messages; 0 is any."""
TOLERATED = 0.02


def configuration(kind: str, path: Path, seed: int = 0) -> Config:
    place = {"source.path": str(path), "data.root": str(WORK / kind / str(seed))}
    return load_config(None, {"seed": seed, "source.kind": kind, **place})


def counts(kind: str, path: Path, expected: dict[str, int]) -> tuple[list[dict[str, Any]], list[Conversation]]:
    """Figures of an import beside what the data set's page says."""
    from iterative_ppo.sources import import_log

    began = time.process_time()
    log = import_log(configuration(kind, path))
    turns = [turn for talk in log.conversations for turn in talk.turns if not turn.terminal]
    rewarded = sum(sum(talk.turns[-1].outcomes) > 0 and len(talk.turns) > 1 for talk in log.conversations)
    found = {"transitions": len(turns), "rewarded": rewarded, "set aside": len(log.set_aside)}
    seconds = time.process_time() - began
    rows = [
        figure(f"{kind}: {name}", value, None, str(expected[name]), value == expected[name], cpu_seconds=seconds)
        for name, value in found.items()
    ]
    return rows, list(log.conversations)


def texts(frame: pd.DataFrame) -> list[str]:
    """What Q sees at each row, as one text: the conversation so far and the suggestion."""
    result, so_far, current = [], "", None
    columns = ("conversation_id", "customer_message", "suggestion", "business_message")
    for talk, customer, suggestion, business in frame[list(columns)].astype(object).itertuples(index=False):
        so_far = "" if talk != current else so_far
        current = talk
        so_far += f" customer {customer if pd.notna(customer) else ''}"
        result.append(f"{so_far} suggestion {suggestion if pd.notna(suggestion) else ''}")
        so_far += f" business {business if pd.notna(business) else ''}"
    return result


def baseline(text: np.ndarray, won: np.ndarray, fit: np.ndarray, held: np.ndarray) -> np.ndarray:
    """TF-IDF and logistic regression on the fit rows, scored on the held-out rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(max_iter=500))
    model.fit(text[fit], won[fit])
    scores: np.ndarray = model.predict_proba(text[held])[:, 1]
    return scores


def learnability(talks: list[Conversation], path: Path, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Held-out AUC of the outcome over splits by wizard: our Q beside regressions that see the same text."""
    found = [_measured(talks, path, seed) for seed in seeds]
    rows = []
    for name, key in (("of Q", "q"), ("of TF-IDF regression", "peer")):
        seconds = float(np.mean([one[f"{key}_seconds"] for one in found]))
        for part in PARTS:
            scores = [one[f"{key}, {part}"] for one in found]
            rows.append(averaged(f"STAR, held-out AUC {name}, {part}", scores, seeds, cpu_seconds=seconds))
    for part in list(PARTS)[1:]:
        less = [one[f"q, {part}"] - one[f"peer, {part}"] for one in found]
        label = f"STAR, Q less TF-IDF regression, {part}"
        rows.append(averaged(label, less, seeds, f">= -{TOLERATED}", at_least(-TOLERATED)))
    return rows


def _measured(talks: list[Conversation], path: Path, seed: int) -> dict[str, float]:
    known = [PARTS, content_hash(path), sections(configuration("star", path, seed), *FITTED, "supervised")]
    return cell("star", "auc", seed, known, lambda: aucs(talks, path, seed))


def aucs(talks: list[Conversation], path: Path, seed: int) -> dict[str, float]:
    """Of one split: Q is fitted by the pipeline's own stages; of each part a regression of its own, on its fit rows."""
    began = time.process_time()
    frame, q = scored(configuration("star", path, seed), split(talks, seed))
    found = {"q_seconds": time.process_time() - began}
    began = time.process_time()
    won = (frame.groupby("conversation_id")["outcome"].transform("max") > 0).to_numpy()
    fit, turn = (frame["part"] == "fit").to_numpy(), frame["turn"].to_numpy()
    text = np.array(texts(frame), dtype=object)
    for part, last in PARTS.items():
        chosen = np.isfinite(q) & ((turn == last) if last else True)
        held = chosen & ~fit
        found[f"q, {part}"] = auc(won[held], q[held])
        found[f"peer, {part}"] = auc(won[held], baseline(text, won, chosen & fit, held))
    return found | {"peer_seconds": time.process_time() - began}


def split(talks: list[Conversation], seed: int) -> list[Conversation]:
    """The same conversations, other wizards held out: a part is a hash of the business's id."""
    return [replace(talk, business_id=f"{seed}-{talk.business_id}", policy_version=LOGGED) for talk in talks]


def scored(config: Config, talks: list[Conversation]) -> tuple[pd.DataFrame, np.ndarray]:
    """The turn table, and Q in each of its rows; NaN where no suggestion was logged."""
    from iterative_ppo.learning.batching import encode_table
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.q_model import QModel
    from tasks.datasets import Dataset
    from tasks.learning import PolicyVersion, fit_q_stage, initial_policy_stage
    from tasks.traffic import for_cloning

    table = config.data.root / "turns.parquet"
    turn_table.write(to_rows(config, talks), table, config.outcomes)
    frame, content = turn_table.read(table, config.outcomes), content_hash(table)
    pi_0 = initial_policy_stage(config, for_cloning(config, talks), f"star {content}")
    policy = PolicyVersion(0, pi_0.path / "model", LOGGED)
    stage = fit_q_stage(config, policy, Dataset(0, table, content), config.data.root / "round")
    encoded = encode_table(frame, LanguagePolicy.load(policy.path).renderer)
    return frame, QModel.load(stage.path / "model").evaluate(encoded).q


def main() -> None:
    """Needs the public logs; says so where they are absent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    parser.add_argument("--seeds", type=int, default=5, help="splits by wizard")
    arguments = parser.parse_args()
    data: Path = arguments.data
    if not data.exists():
        parser.exit(0, f"{data}: the public logs are not here; name their folder with --data\n")
    star, talks = counts("star", data / "star", {"transitions": 9264, "rewarded": 1293, "set aside": 200})
    craigslist, _ = counts("craigslist", data / "craigslist", {"transitions": 2342, "rewarded": 453, "set aside": 10})
    write("bench-star", [*star, *craigslist, *learnability(talks, data / "star", range(arguments.seeds))])


if __name__ == "__main__":
    main()
