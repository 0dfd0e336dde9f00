"""A team's own log: one offline round of it, `dvc repro`'s stages on it, and the nights before there is a champion."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from gate_evidence import UNGUARDED
from stores import stores

from iterative_ppo.config import Config, load_config
from iterative_ppo.environments.renovation import Renovation, Script
from iterative_ppo.environments.rollout import collect
from iterative_ppo.errors import ConfigError, SourceError, TrainingError
from iterative_ppo.files import read_json
from iterative_ppo.mdp import turn_table
from iterative_ppo.sources.table import import_table
from tasks import registry, suitability, tracking
from tasks.datasets import inbox, turns_folder, write_once
from tasks.state import load_state
from tasks.traffic import to_rows

CONVERSATIONS = 60


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a team has: JSON Lines with the required columns alone, the last line torn."""
    talks = collect(Script(0.5), Renovation(), CONVERSATIONS, 5, "staff")
    columns = ["conversation_id", "turn", "customer_message", "suggestion", "business_message"]
    frame = to_rows(load_config(), talks)
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    frame[columns].assign(outcome=frame["outcome_purchase"]).to_json(path, orient="records", lines=True)
    with path.open("a") as file:
        file.write('{"conversation_id": "torn", "turn": 1, "custo')
    return path


def settings(root: Path, log: Path, **changes: Any) -> dict[str, Any]:
    return {
        **stores(root),
        "source.kind": "table",
        "source.path": str(log),
        "policy.hidden_size": 16,
        "policy.heads": 2,
        "policy.layers": 1,
        "policy.max_prompt_tokens": 200,
        "policy.max_response_tokens": 24,
        "supervised.epochs": 2.0,
        "data.evidence_share": 0.3,
        "q.value_epochs": 1.0,
        "q.epochs": 1.0,
        "improve.ppo.episodes": 64,
        "improve.best_of_n.epochs": 1.0,
        "improve.best_of_n.samples": 2,
        **UNGUARDED,
    } | changes


def identities(config: Config, place: Path) -> set[str]:
    return set(turn_table.read(place, config.outcomes)["conversation_id"])


def test_an_offline_round_of_a_log(server: None, log: Path, tmp_path: Path) -> None:
    from flows.offline import offline_round
    from flows.reporting import publish

    overrides = settings(tmp_path, log)
    config = load_config(None, overrides)
    record = offline_round(None, overrides)
    store = tracking.open_tracking(config)
    assert registry.champion(store) == 1
    verdict = record["offline"]["verdict"]
    state = load_state(config.data.root)
    assert state.phase == {"test": "test", "reject": "finished"}[verdict]
    assert (registry.challenger(store) == 2) == (verdict == "test")
    assert len(identities(config, turns_folder(config, 0))) == CONVERSATIONS
    assert 0.0 < record["distance"]["held_out_nats_a_token"] < 10.0
    recorded = read_json(config.data.root / "rounds" / "0000" / "validated" / "validation.json")
    assert recorded["success_above"] == 0.0, "which the report goes by"
    page = publish(config, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1 set aside at import" in page
    assert "expected one JSON object a line" in page
    assert "Success in the log" in page and "Success at start" not in page
    if verdict == "test":
        versions = registry.versions(store, registry.POLICY)
        assert offline_round(None, overrides) == record, "the log's challenger awaits its test: nothing is done again"
        assert registry.versions(store, registry.POLICY) == versions


def test_a_log_without_an_evidence_part_is_refused_before_anything_trains(
    server: None, log: Path, tmp_path: Path
) -> None:
    """One business is in one part; nothing is stored, so that what the error advises helps."""
    from flows.offline import offline_round

    business, rows = tmp_path / "one.jsonl", [json.loads(line) for line in log.read_text().splitlines()[:-1]]
    business.write_text("".join(json.dumps({**row, "business_id": "acme"}) + "\n" for row in rows), encoding="utf-8")
    overrides = settings(tmp_path, business, **{"data.split_by": "business", "data.evidence_share": 0.01})
    with pytest.raises(TrainingError, match=r"none of 60 .* evidence part, .* business_id decides, and there are 1:"):
        offline_round(None, overrides)
    root = load_config(None, overrides).data.root
    assert not list(root.rglob("*.parquet"))


def test_nights_go_on_from_a_log_whose_challenger_was_rejected(
    server: None,
    log: Path,
    tmp_path: Path,
    saved_models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from flows.night import night
    from flows.offline import offline_round

    nobody_passes = {"gate.guardrails.length.limit": 0.0}
    overrides = settings(tmp_path, log, **nobody_passes, **{"simulator.conversations": CONVERSATIONS})
    config = load_config(None, overrides)
    record = offline_round(None, overrides)
    assert record["offline"]["verdict"] == "reject"
    assert offline_round(None, overrides) == record
    assert load_state(config.data.root).rounds == [record], "begun again, it is the same round"
    other = tmp_path / "other.jsonl"
    other.write_text(log.read_text() + "\n")
    with pytest.raises(SourceError, match=r"other\.jsonl: .* holds the round of another log"):
        offline_round(None, overrides | {"source.path": str(other)})
    for step in (offline_round, night):
        with pytest.raises(
            ConfigError, match=r"policy\.base_model .*policy0: .* begin with another, a tiny model made"
        ):
            step(None, overrides | {"policy.base_model": str(saved_models / "policy0")})

    talks = collect(Script(0.5), Renovation(), CONVERSATIONS, 99, "1", "champion")
    write_once(inbox(config) / "live.parquet", to_rows(config, talks), config)
    told: list[str] = []
    monkeypatch.setattr(suitability._LOG, "warning", lambda words, *values: told.append(words % values))
    assert night(None, overrides | {"policy.temperature": 0.5}) == "collect"
    assert any("does not take up policy.temperature = 0.5 (its 1.0)" in words for words in told)
    state = load_state(config.data.root)
    assert [(one["round"], one["champion"]) for one in state.rounds] == [(0, 1), (1, 1)]
    assert offline_round(None, overrides) == state.rounds[-1]
    assert load_state(config.data.root) == state, "that is no longer the log's round"


@pytest.mark.parametrize("source", ["table", "renovation"])
def test_the_stages_of_dvc_repro_are_of_the_source(source: str, log: Path, tmp_path: Path) -> None:
    """Of a log to their end; the simulator's, which takes longer, as far as the two differ."""
    from flows.repro import STAGES, folder, run_offline_stage

    sizes = {"simulator.corpus_conversations": 40, "simulator.conversations": 20, "q.corpus_epochs": 0.0}
    config = load_config(None, settings(tmp_path, log, **{"source.kind": source, **sizes}))
    last = "gate" if source == "table" else "validate"
    for stage in STAGES:
        run_offline_stage(config, stage)
        if stage == last:
            break
    assert (folder(config) / f"{last}.json").exists()
    theirs = import_table(log, config.outcomes, config.data).conversations
    collected = identities(config, folder(config) / "collected" / "turns.parquet")
    assert (collected == {talk.conversation_id for talk in theirs}) == (source == "table")


def test_the_stages_of_dvc_repro_see_another_log_division_and_label(log: Path, tmp_path: Path) -> None:
    """What a stage did before is not taken for what another setting, or a file outside of DVC, would make."""
    from flows.repro import folder, run_offline_stage

    mine, rows = tmp_path / "mine.jsonl", log.read_text().splitlines()[:-1]
    mine.write_text("\n".join(rows))

    def made(stage: str, result: str, **changes: Any) -> pd.DataFrame:
        config = load_config(None, settings(tmp_path, mine, **changes))
        (folder(config) / "policy" / "model").mkdir(parents=True, exist_ok=True)
        run_offline_stage(config, stage)
        return turn_table.read(folder(config) / result / "turns.parquet", config.outcomes)

    first, other = (made("collect", "collected", **{"data.evidence_share": share}) for share in (0.3, 0.6))
    assert (other["part"] == "evidence").sum() > (first["part"] == "evidence").sum()
    unreported = [{**row, "outcome": row["outcome"] or None} for row in map(json.loads, rows)]
    mine.write_text("\n".join(map(json.dumps, unreported)))
    assert made("collect", "collected")["outcome_origin"].isna().any()
    said = {"side": "customer", "pattern": "[a-z]", "first_turn": 1, "last_turn": None, "value": 1.0}
    for labels, origins in (
        ({}, {"reported"}),
        ({"labels.rules": {"purchase": said}, "labels.kind": "rule"}, {"reported", "rule"}),
    ):
        assert set(made("validate", "validated", **labels)["outcome_origin"].dropna()) == origins
    with pytest.raises(TrainingError, match=r"labels\.kind classifier: \d+ conversations have a reported outcome"):
        made("validate", "validated", **{"labels.kind": "classifier"})


def test_dvc_runs_each_stage_of_what_it_is_made_from() -> None:
    root = Path(__file__).parents[1]
    stages, known = (yaml.safe_load((root / name).read_text()) for name in ("dvc.yaml", "params.yaml"))
    stages = stages["stages"]
    for stage in stages.values():
        assert {name.partition(".")[0] for name in stage["params"]} <= set(known)
    assert {name for name, stage in stages.items() if stage.get("always_changed")} == {"initial-policy", "collect"}
    assert stages["collect"]["outs"] == [{"data/repro/collected": {"persist": True}}]
    assert {"data", "outcomes"} <= set(stages["initial-policy"]["params"])
    assert {"data", "outcomes", "labels", "seed"} <= set(stages["validate"]["params"])


def test_a_night_of_a_teams_own_does_not_begin_with_the_simulators_policy(
    server: None, log: Path, saved_models: Path, tmp_path: Path
) -> None:
    """It says what to do; a base model that answers as it is needs no log."""
    from flows.night import night

    overrides = settings(tmp_path, log)
    config = load_config(None, overrides)
    with pytest.raises(ConfigError, match=r"no champion yet, and at night source\.kind table"):
        night(None, overrides)
    assert registry.champion(tracking.open_tracking(config)) is None
    base = {"policy.init": "prompt", "policy.base_model": str(saved_models / "policy0")}
    limits = {"policy.max_prompt_tokens": 200, "policy.max_response_tokens": 8}
    assert night(None, overrides | base | limits) == "collect"
    moved = shutil.copytree(saved_models / "policy0", tmp_path / "moved")
    assert night(None, overrides | base | limits | {"policy.base_model": str(moved)}) == "collect"
    (moved / "policy.json").unlink()
    with pytest.raises(ConfigError, match=r"begin with another, made of .*policy0"):
        night(None, overrides | base | limits | {"policy.base_model": str(moved)})
    assert registry.champion(tracking.open_tracking(config)) == 1
