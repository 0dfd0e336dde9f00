"""The nightly flow on a real Prefect server: initial policy, training, A/B test, promotion, resumption, the lock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from gate_evidence import UNGUARDED
from stores import stores

from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.renovation import Renovation, Script
from iterative_ppo.environments.rollout import collect
from iterative_ppo.errors import StoreError
from iterative_ppo.files import read_json
from tasks import registry, tracking
from tasks.datasets import inbox, round_folder, turns_folder, write_once
from tasks.state import load_state
from tasks.traffic import to_rows

CONVERSATIONS = 120


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("night")
    return {
        **stores(root),
        "simulator.corpus_conversations": 200,
        "simulator.conversations": CONVERSATIONS,
        "abtest.conversations": 2 * CONVERSATIONS,
        "policy.hidden_size": 32,
        "supervised.epochs": 10.0,
        "supervised.learning_rate": 0.01,
        "q.corpus_epochs": 6.0,
        "q.value_epochs": 3.0,
        "q.epochs": 6.0,
        "improve.logged.epochs": 1.0,
        "improve.ppo.episodes": 2048,
        "improve.ppo.learning_rate": 0.003,
        "data.evidence_share": 0.3,
        "gate.fqe": True,
        "q.iterations": 2,
        "q.samples": 1,
        "improve.ppo.kl_coefficient": 0.0,
        "rounds.last_policy_iterations": 2,
        "improve.q_iterations": 1,
        **UNGUARDED,
        "rounds.max_rounds": 2,
    }


@pytest.fixture(scope="module")
def config(overrides: dict[str, Any]) -> Config:
    return load_config(None, overrides)


def arrive(config: Config, skill: float, version: int, arm: str, seed: int, conversations: int = CONVERSATIONS) -> None:
    """Traffic of a scripted agent under a policy's name: the outcomes are real, the policy is not asked."""
    talks = collect(Script(skill), Renovation(), conversations, seed, str(version), arm)
    write_once(inbox(config) / f"{arm}-{version}-{seed}.parquet", to_rows(config, talks), config)


def test_nights_from_nothing_to_a_promotion(server: None, overrides: dict[str, Any], config: Config) -> None:
    from flows.night import night

    assert night(None, overrides) == "collect"
    store = tracking.open_tracking(config)
    assert registry.champion(store) == 1

    arrive(config, 0.4, 1, "champion", 8, CONVERSATIONS // 2)
    assert night(None, overrides) == "collect", "half of the conversations are not enough"
    arrive(config, 0.4, 1, "champion", 99, CONVERSATIONS // 2)
    assert night(None, overrides) == "test"
    state = load_state(config.data.root)
    assert state.experiment is not None
    assert registry.challenger(store) == state.experiment.challenger == 2
    assert (turns_folder(config, 0) / "turns.parquet").exists()
    found = read_json(round_folder(config, 0) / "gate" / "evidence.json")["estimates"]
    assert found["fqe"]["low"] < found["fqe"]["value"] < found["fqe"]["high"] and "q_model" not in found

    assert night(None, overrides) == "test", "nobody has answered a customer yet: the test goes on"
    arrive(config, 0.2, 1, "champion", 10)
    arrive(config, 1.0, 2, "challenger", 11)
    night(None, overrides)
    assert registry.champion(store) == 2
    state = load_state(config.data.root)
    assert state.round == 1
    assert state.rounds[0]["decision"]["verdict"] == "promote"
    assert [entry["kind"] for entry in registry.history(config.data.root) if "kind" in entry].count("promote") >= 2


def test_a_finished_stage_is_not_done_again(server: None, overrides: dict[str, Any], config: Config) -> None:
    """The state is set back as a kill between the last stage and the state's write would leave it."""
    from flows.night import night
    from tasks.state import save_state

    before = load_state(config.data.root)
    folders = sorted((config.data.root / "rounds" / "0001").glob("*/stage.json"))
    assert len(folders) >= 5
    often = [read_json(round_folder(config, k) / "improved" / "stage.json")["metrics"] for k in (0, 1)]
    assert [one["policy_iterations"] for one in often] == [1.0, 2.0], "the last round has its own"
    times = {path: path.stat().st_mtime_ns for path in folders}
    save_state(config.data.root, before.advance(phase="train", experiment=None, rounds=before.rounds[:1], round=1))
    versions = len(registry.versions(tracking.open_tracking(config), registry.POLICY))
    night(None, overrides)
    assert {path: path.stat().st_mtime_ns for path in folders} == times
    assert len(registry.versions(tracking.open_tracking(config), registry.POLICY)) == versions
    assert load_state(config.data.root) == before


def test_a_second_night_at_once_is_refused(config: Config, overrides: dict[str, Any], server: None) -> None:
    from flows.night import night

    with FileLock(config.data.root / "night.lock"), pytest.raises(StoreError, match="another run is at work"):
        night(None, overrides)


def test_every_round_has_its_runs_data_and_models(server: None, config: Config) -> None:
    from mlflow import MlflowClient

    store = tracking.open_tracking(config)
    client = MlflowClient(store.uri)
    run = store.find_round(0)
    assert run is not None
    children = client.search_runs([client.get_run(run).info.experiment_id], f"tags.`mlflow.parentRunId` = '{run}'")
    names = {child.info.run_name for child in children}
    assert {"initial policy", "validate and version", "returns", "fit q", "prompts", "improve", "offline gate"} <= names
    fitted = next(child for child in children if child.info.run_name == "fit q")
    assert fitted.inputs.dataset_inputs[0].dataset.digest
    assert any(item.path.endswith("round=0000.dvc") for item in client.list_artifacts(fitted.info.run_id))
    version = registry.version(store, registry.POLICY, 2)
    assert version.tags["parent"] == "1"
    assert version.tags["q_version"] == "1"


def test_a_report_leaves_a_finished_round_finished(server: None, config: Config, tmp_path: Path) -> None:
    from flows.reporting import publish

    store, number = tracking.open_tracking(config), load_state(config.data.root).rounds[-1]["round"]
    run = store.find_round(number)
    assert run is not None
    store.finish(run)
    before = store.client.get_run(run).info
    publish(config, tmp_path / "report.html")
    after = store.client.get_run(run).info
    assert (after.status, after.end_time) == ("FINISHED", before.end_time)
    assert "report.html" in {artifact.path for artifact in store.client.list_artifacts(run)}


def test_a_lost_dataset_comes_back_from_the_remote(config: Config) -> None:
    import shutil

    from flows.data import checkout

    folder = turns_folder(config, 0)
    before = (folder / "turns.parquet").read_bytes()
    shutil.rmtree(folder)
    folder.with_name(f"{folder.name}.dvc").unlink()
    assert checkout(config, 0) == folder
    assert (folder / "turns.parquet").read_bytes() == before


def test_the_simulator_refuses_outcomes_that_are_not_its_own(config: Config) -> None:
    from iterative_ppo.errors import ConfigError
    from tasks.traffic import environment

    with pytest.raises(ConfigError, match="purchase"):
        environment(replace_outcomes(config))


def replace_outcomes(config: Config) -> Config:
    return config.model_copy(update={"outcomes": {"booking": 1.0}})
