"""A night whose conversations teach nothing: its round is rejected with the reason, the next has data of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from gate_evidence import UNGUARDED
from stores import stores

from iterative_ppo.config import load_config
from iterative_ppo.environments.renovation import Renovation, Script
from iterative_ppo.environments.rollout import collect
from iterative_ppo.errors import TrainingError
from tasks import registry, tracking
from tasks.datasets import inbox, write_once
from tasks.state import load_state
from tasks.traffic import to_rows

CONVERSATIONS = 60


@pytest.fixture
def overrides(tmp_path: Path) -> dict[str, Any]:
    return {
        **stores(tmp_path),
        "simulator.corpus_conversations": 100,
        "simulator.conversations": CONVERSATIONS,
        "policy.hidden_size": 16,
        "supervised.epochs": 1.0,
        "q.corpus_epochs": 0.0,
        "improve.best_of_n.epochs": 1.0,
        "improve.ppo.episodes": 0,
        "rounds.max_rounds": 3,
        **UNGUARDED,
    }


def test_a_round_without_a_success_is_rejected_and_the_next_learns(server: None, overrides: dict[str, Any]) -> None:
    from flows.night import night
    from flows.reporting import publish, status_lines
    from tasks.lineage import lineage

    config = load_config(None, overrides)

    def arrive(skill: float, seed: int) -> None:
        talks = collect(Script(skill), Renovation(), CONVERSATIONS, seed, "1", "champion")
        if not skill:
            talks = [talk for talk in talks if talk.turns[-1].outcomes[0] == 0]
        write_once(inbox(config) / f"{seed}.parquet", to_rows(config, talks), config)

    assert night(None, overrides) == "collect"
    arrive(0.0, 1)
    arrive(0.0, 2)
    assert night(None, overrides) == "collect", "the pipeline waits for other conversations"
    state = load_state(config.data.root)
    assert state.round == 1
    assert state.rounds[0]["offline"]["verdict"] == "reject" and "challenger" not in state.rounds[0]
    assert "no outcome differs" in state.rounds[0]["offline"]["reasons"][0]
    assert any("no outcome differs" in line for line in status_lines(config))
    publish(config, config.data.root / "report.html")
    assert "no outcome differs" in (config.data.root / "report.html").read_text(encoding="utf-8")

    arrive(1.0, 3)
    night(None, overrides)
    assert load_state(config.data.root).rounds[1]["challenger"] == 2
    assert lineage(config, tracking.open_tracking(config), 2)["parent"] == 1
    assert registry.champion(tracking.open_tracking(config)) == 1


def test_a_simulator_without_a_success_is_an_error(server: None, overrides: dict[str, Any]) -> None:
    from flows.simulation import simulated_rounds

    root = load_config(None, overrides).data.root
    for rounds in (1, 2):
        with pytest.raises(TrainingError, match="no outcome differs"):
            simulated_rounds(None, {**overrides, "simulator.max_business_turns": 1})
        assert len(load_state(root).rounds) == rounds, "begun again it collects anew"
