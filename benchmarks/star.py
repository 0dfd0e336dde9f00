"""`make bench-star`: the importers' counts, and Q's held-out AUC on STAR beside a TF-IDF regression, same split."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.results_file import figure, write
from iterative_ppo.config import Config, load_config
from iterative_ppo.evaluation.metrics import auc
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from tasks.traffic import to_rows

WORK = Path(__file__).parent / "work" / "star"


def configuration(kind: str, path: Path) -> Config:
    return load_config(None, {"source.kind": kind, "source.path": str(path), "data.root": str(WORK / kind)})


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


def baseline(frame: pd.DataFrame, fit: np.ndarray, held: np.ndarray, won: np.ndarray) -> np.ndarray:
    """TF-IDF and logistic regression on the fit rows, scored on the held-out rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    text = np.array(texts(frame), dtype=object)
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    model = make_pipeline(words, LogisticRegression(max_iter=500))
    model.fit(text[fit], won[fit])
    scores: np.ndarray = model.predict_proba(text[held])[:, 1]
    return scores


def learnability(talks: list[Conversation], path: Path) -> list[dict[str, Any]]:
    """Held-out AUC of the outcome: our Q, fitted by the pipeline's own stages, and the baseline, on the same rows."""
    from flows.offline import for_cloning
    from iterative_ppo.learning.batching import encode_table
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.q_model import QModel
    from tasks.datasets import Dataset
    from tasks.learning import PolicyVersion, fit_q_stage, initial_policy_stage
    from tasks.traffic import LOGGED

    config = configuration("star", path)
    talks = [Conversation(t.conversation_id, t.turns, t.customer_id, t.business_id, t.context, LOGGED) for t in talks]
    table = WORK / "turns.parquet"
    turn_table.write(to_rows(config, talks), table, config.outcomes)
    frame = turn_table.read(table, config.outcomes)
    began = time.process_time()
    pi_0 = initial_policy_stage(config, for_cloning(config, talks), "star")
    policy = PolicyVersion(0, pi_0.path / "model", LOGGED)
    q_stage = fit_q_stage(config, policy, Dataset(0, table, ""), WORK / "round")
    seconds = time.process_time() - began
    q = QModel.load(q_stage.path / "model").evaluate(encode_table(frame, LanguagePolicy.load(policy.path).renderer)).q
    won = (frame.groupby("conversation_id")["outcome"].transform("max") > 0).to_numpy()
    usable, fit = np.isfinite(q), (frame["part"] == "fit").to_numpy()
    held = np.flatnonzero(usable & ~fit)
    began = time.process_time()
    peer = baseline(frame, np.flatnonzero(usable & fit), held, won)
    peer_seconds = time.process_time() - began
    turn = frame["turn"].to_numpy()[held]
    rows = []
    for name, chosen in (("all turns", turn > 0), ("after 4 messages", turn == 3), ("after 8 messages", turn == 5)):
        ours, theirs = auc(won[held][chosen], q[held][chosen]), auc(won[held][chosen], peer[chosen])
        rows.append(figure(f"STAR, held-out AUC of Q, {name}", ours, cpu_seconds=seconds))
        rows.append(figure(f"STAR, held-out AUC of TF-IDF regression, {name}", theirs, cpu_seconds=peer_seconds))
    return rows


def main() -> None:
    """Needs the public logs; says so where they are absent."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    data = parser.parse_args().data
    if not data.exists():
        parser.exit(0, f"{data}: the public logs are not here; name their folder with --data\n")
    star, talks = counts("star", data / "star", {"transitions": 9264, "rewarded": 1293, "set aside": 200})
    craigslist, _ = counts("craigslist", data / "craigslist", {"transitions": 2342, "rewarded": 453, "set aside": 10})
    write("bench-star", [*star, *craigslist, *learnability(talks, data / "star")])


if __name__ == "__main__":
    main()
