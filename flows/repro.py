"""`dvc repro`: one round's offline stages on `data/repro`, by the same functions as the nightly flow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from iterative_ppo.config import Config
from iterative_ppo.errors import ConfigError, did_you_mean
from iterative_ppo.files import content_hash, write_json
from iterative_ppo.mdp import turn_table
from tasks import gating, labels, learning, validation
from tasks.datasets import Dataset
from tasks.learning import PolicyVersion, Prompts
from tasks.stage import Stage, load_stage, run_stage
from tasks.traffic import (
    LOGGED,
    first_corpus,
    for_cloning,
    name_of_log,
    read_logs,
    simulate,
    to_rows,
    version_of_environment,
)

PI_0 = 0


def folder(config: Config) -> Path:
    return config.data.root / "repro"


def run_offline_stage(config: Config, name: str) -> None:
    """Run one stage and write its metrics beside it. Raises ConfigError for an unknown stage."""
    if name not in STAGES:
        raise ConfigError(f"unknown stage {name!r}{did_you_mean(name, STAGES)}; known are {', '.join(STAGES)}")
    stage = STAGES[name](config)
    write_json(folder(config) / f"{name}.json", stage.metrics)


def _initial_policy(config: Config) -> Stage:
    if config.source.simulated:
        stage = learning.initial_policy_stage(config, *first_corpus(config))
    else:
        corpus = for_cloning(config, read_logs(config).conversations)
        stage = learning.initial_policy_stage(config, corpus, str(config.source.path))
    return run_stage(
        folder(config) / "policy",
        {"from": stage.key},
        lambda draft: _copied(stage.path / "model", draft, stage.metrics),
    )


def _copied(source: Path, draft: Path, metrics: dict[str, float]) -> dict[str, float]:
    import shutil

    shutil.copytree(source, draft / "model")
    return metrics


def _champion(config: Config) -> PolicyVersion:
    logged_as = None if config.source.simulated else LOGGED
    return PolicyVersion(PI_0, folder(config) / "policy" / "model", logged_as)


def _collect(config: Config) -> Stage:
    champion = _champion(config)
    inputs = {"policy": content_hash(champion.path), "simulator": config.simulator.model_dump(), "seed": config.seed}
    inputs |= _of_turns(config)
    if config.source.simulated:
        inputs["environment"] = version_of_environment(config)
    elif config.source.path is not None:
        inputs["log"] = name_of_log(config)

    def work(draft: Path) -> dict[str, float]:
        if config.source.simulated:
            talks = simulate(config, champion, config.simulator.conversations, config.seed)
        else:
            talks = read_logs(config).conversations
        turn_table.write(to_rows(config, talks), draft / "turns.parquet", config.outcomes)
        return {"conversations": len(talks)}

    return run_stage(folder(config) / "collected", inputs, work)


def _validate(config: Config) -> Stage:
    source = folder(config) / "collected" / "turns.parquet"

    def work(draft: Path) -> dict[str, float]:
        frame, metrics = labels.labelled_alone(turn_table.read(source, config.outcomes), config)
        here = config.data.model_copy(update={"root": folder(config)})  # the nights' round 0 has its own quarantine
        checked = validation.validate(frame, config.model_copy(update={"data": here}))
        turn_table.write(checked.good, draft / "turns.parquet", config.outcomes)
        return metrics | {"quarantined": float(checked.statistics["quarantined_conversations"])}

    inputs = {"from": content_hash(source), "labels": config.labels.model_dump(mode="json"), "seed": config.seed}
    return run_stage(folder(config) / "validated", inputs | _of_turns(config), work)


def _of_turns(config: Config) -> dict[str, Any]:
    return {"data": config.data.model_dump(mode="json"), "outcomes": config.outcomes}


def _dataset(config: Config) -> Dataset:
    path = folder(config) / "validated" / "turns.parquet"
    return Dataset(PI_0, path, content_hash(path))


def _returns(config: Config) -> Stage:
    return learning.returns_stage(config, _dataset(config), folder(config))


def _fit_q(config: Config) -> Stage:
    return learning.fit_q_stage(config, _champion(config), _dataset(config), folder(config))


def _improve(config: Config) -> Stage:
    champion, dataset = _champion(config), _dataset(config)
    prompts = learning.prompts_stage(config, champion, dataset, folder(config))
    q = folder(config) / "q" / "model"
    return learning.improve_stage(config, champion, Prompts(prompts.path, dataset), q, folder(config))


def _gate(config: Config) -> Stage:
    candidate = load_stage(folder(config) / "improved").path / "model"
    return gating.gate_stage(
        config, _champion(config), candidate, folder(config) / "q", _dataset(config), folder(config)
    )


STAGES: dict[str, Callable[[Config], Stage]] = {
    "initial-policy": _initial_policy,
    "collect": _collect,
    "validate": _validate,
    "returns": _returns,
    "fit-q": _fit_q,
    "improve": _improve,
    "gate": _gate,
}
