"""The offline gate as a stage: evidence on held-out states, then a pure decision."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from iterative_ppo.config import Config
from iterative_ppo.errors import TrainingError
from iterative_ppo.evaluation.evidence import OfflineEvidence, paired_gain, repetition
from iterative_ppo.evaluation.gate import Decision, offline_gate
from iterative_ppo.files import content_hash, write_json
from iterative_ppo.mdp import turn_table
from tasks.datasets import Dataset
from tasks.learning import PolicyVersion, champion_round
from tasks.stage import Stage, load_stage, run_stage

EXAMPLES = 8


def gate_stage(
    config: Config, champion: PolicyVersion, candidate: Path, q_stage: Path, dataset: Dataset, folder: Path
) -> Stage:
    """Evidence and decision: `evidence.json`, `decision.json`, and what both policies say in a few states."""
    inputs = {
        "gate": config.gate.model_dump(),
        "champion": content_hash(champion.path),
        "candidate": content_hash(candidate),
        "q": content_hash(q_stage / "model"),
        "md5": dataset.md5,
        "seed": config.seed,
    }

    def work(draft: Path) -> Mapping[str, float]:
        evidence, examples = gather(config, champion, candidate, q_stage, dataset)
        decision = offline_gate(evidence, config.gate)
        write_json(draft / "evidence.json", evidence.as_dict())
        write_json(draft / "decision.json", decision.as_dict())
        write_json(draft / "examples.json", examples)
        numbers = {k: v for k, v in evidence.as_dict().items() if isinstance(v, int | float)}
        return {**numbers, "passed": float(decision.verdict == "test")}

    return run_stage(folder / "gate", inputs, work)


def decision_of(stage: Stage) -> Decision:
    """The decision that a gate stage left."""
    value = stage.read("decision.json")
    return Decision(value["verdict"], tuple(value["reasons"]))


def gather(
    config: Config, champion: PolicyVersion, candidate: Path, q_stage: Path, dataset: Dataset
) -> tuple[OfflineEvidence, list[dict[str, Any]]]:
    """Both policies on the same states of the evidence part. Raises TrainingError where it holds none."""
    from iterative_ppo.learning.compare import speak
    from iterative_ppo.learning.improve.ppo import prompts_of
    from iterative_ppo.learning.language_model import LanguagePolicy, threads
    from iterative_ppo.learning.q_model import QModel

    with threads(config.runtime.threads):
        old = LanguagePolicy.load(champion.path, device=config.runtime.device)
        new = LanguagePolicy.load(candidate, device=config.runtime.device)
        q = QModel.load(q_stage / "model", config.runtime.device)
        current, frame = champion_round(old, champion.label, dataset, config)
        rows = held_out_rows(current.fit, turn_table.actions(frame), config)
        prompts = prompts_of(current.encoded.sequences, rows)
        before = speak(old, new, q, prompts, config.gate.samples, config.seed)
        after = speak(new, old, q, prompts, config.gate.samples, config.seed)
    group = frame["conversation_id"].to_numpy(dtype=str)[rows]
    low, high = paired_gain(before.q.mean(axis=1), after.q.mean(axis=1), group)
    q_metrics = load_stage(q_stage).metrics
    evidence = OfflineEvidence(
        states=len(rows),
        samples=config.gate.samples,
        q_champion=float(before.q.mean()),
        q_challenger=float(after.q.mean()),
        q_gain_low=low,
        q_gain_high=high,
        kl_challenger_champion=after.kl,
        kl_champion_challenger=before.kl,
        missing_eos=float(1.0 - after.responses.finished.mean()),
        repetition=repetition(after.responses.tokens),
        length_ratio=float(after.lengths.mean() / before.lengths.mean()),
        abstained=float(np.mean([new.suggestion(t).status == "abstained" for t in after.responses.tokens])),
        q_r2=q_metrics.get("r2", float("nan")),
        state_baseline_r2=q_metrics.get("state_only_r2", float("nan")),
    )
    talks = {talk.conversation_id: talk for talk in turn_table.conversations(frame)}
    examples = []
    for k in np.linspace(0, len(rows) - 1, min(EXAMPLES, len(rows))).astype(int):
        state = talks[group[k]].state(int(frame["turn"].iloc[rows[k]]) - 1)
        said = [
            {"text": p.suggestion(s.responses.tokens[k * s_k]).text or "(no suggestion)", "q": float(s.q[k, 0])}
            for p, s, s_k in ((old, before, config.gate.samples), (new, after, config.gate.samples))
        ]
        history = [{"customer": turn.customer_message, "business": turn.business_message} for turn in state.history]
        history.append({"customer": state.customer_message, "business": None})
        examples.append({"messages": history, "champion": said[0], "challenger": said[1]})
    return evidence, examples


def held_out_rows(fit: np.ndarray, actions: np.ndarray, config: Config) -> np.ndarray:
    """Table rows of the evidence part that hold an action, at most `gate.states` of them, spread evenly."""
    rows = np.flatnonzero(~fit & actions)
    if not len(rows):
        raise TrainingError("no held-out conversation with an action: collect more, or raise data.evidence_share")
    if len(rows) <= config.gate.states:
        return rows
    return rows[np.linspace(0, len(rows) - 1, config.gate.states).astype(int)]
