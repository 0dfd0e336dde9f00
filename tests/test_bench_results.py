"""Results files: what was not measured stays as it was; intervals; cells that know their settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import learning_table, methods, q, q_cells, results_file
from benchmarks.methods import MONTE_CARLO, OURS, SMALL, configuration
from benchmarks.q_cells import FITTED, cell, sections
from benchmarks.results_file import figure, jackknifed, mean_interval, merged, write
from iterative_ppo.config import load_config
from iterative_ppo.files import read_json, write_json


def names(rows: list[dict[str, Any]]) -> list[str]:
    return [row["figure"] for row in rows]


def test_rows_that_were_not_made_again_stay_and_new_ones_follow_those_they_came_after() -> None:
    before = [figure(name, 1.0) for name in ("a", "b", "c")]
    rows = merged(before, [figure("a", 2.0), figure("new", 2.0), figure("c", 2.0), figure("last", 2.0)])
    assert names(rows) == ["a", "new", "b", "c", "last"]
    assert [row["value"] for row in rows] == [2.0, 2.0, 1.0, 2.0, 2.0]
    assert names(merged([], before)) == ["a", "b", "c"]
    assert names(merged(before, [figure("new", 2.0)])) == ["a", "b", "c", "new"]


@pytest.mark.parametrize("whole", [False, True])
def test_only_the_whole_table_drops_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    write("x", [figure("a", 1.0), figure("b", 1.0)], whole=False)
    write("x", [figure("b", 2.0)], whole)
    assert names(read_json(tmp_path / "x.json")) == (["b"] if whole else ["a", "b"])


def test_a_part_that_cannot_be_measured_here_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    for part in ("speed", "chain", "exploration", "personas", "outcomes", "credit", "credit_learning", "ranking"):
        monkeypatch.setattr(q, part, lambda *_, name=part: [figure(name, 2.0)])
    write("bench-q", [figure("STAR", 1.0), figure("chain", 1.0), figure("speed", 1.0)])
    for arguments in (["--parts", "chain"], []):
        monkeypatch.setattr("sys.argv", ["q", "--data", str(tmp_path / "absent"), *arguments])
        q.main()
        rows = {row["figure"]: row["value"] for row in read_json(tmp_path / "bench-q.json")}
        assert rows["STAR"] == 1.0
        assert rows["chain"] == 2.0
        assert rows["speed"] == (1.0 if arguments else 2.0)


def test_the_jackknife_of_a_mean_is_its_t_interval_and_of_one_seed_it_is_none() -> None:
    values = np.random.default_rng(0).normal(size=6)
    assert jackknifed(lambda x: float(x.mean()), values) == pytest.approx(mean_interval(values.tolist()))
    assert np.isnan(jackknifed(lambda x: float(x.mean()), values[:1])[1:]).all()


def test_a_changed_default_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(q_cells, "WORK", tmp_path)
    found = [
        cell("part", "method", 0, sections(load_config(None, changed), *FITTED), lambda k=k: {"value": k})["value"]
        for k, changed in enumerate(({}, {"q.epochs": 7.0}, {"improve.ppo.episodes": 64}, {"policy.layers": 1}))
    ]
    assert found == [0, 1, 0, 3]


def test_of_learning_the_methods_asked_for_alone_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def finished(*_: Any) -> learning_table.Results:
        result = {"success": 0.5, "well_formed": 1.0, "greedy": None, "conversations": 100, "cpu_seconds": 1.0}
        return {(method, k): [{**result, "success": 0.5 + k / 10}] for method in (OURS, MONTE_CARLO) for k in (0, 1)}

    monkeypatch.setattr(learning_table, "_finished", finished)
    rows = names(learning_table.table([0], 1, [MONTE_CARLO]))
    told = [f"{what}, {MONTE_CARLO}, round {k}" for k in (0, 1) for what in ("success", "well-formed messages")]
    assert rows == [*told, f"margin over {MONTE_CARLO}, round 1"]
    assert {"pi_0's success", "success after 1 rounds"} <= set(names(learning_table.table([0], 1)))


def test_of_a_method_that_deploys_more_often_the_last_policy_of_a_round_is_told_and_the_cost_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "WORK", tmp_path)
    for k in range(4):
        reached = {"success": 0.1 * k, "well_formed": 1.0, "conversations": 100} if k in (0, 3) else {}
        write_json(methods.cell_path(SMALL, 0) / f"{k}" / "result.json", {**reached, "cpu_seconds": 10.0})
    rows = {row["figure"]: row for row in learning_table.table([0], 1, ["pi_0 sharpened", SMALL])}
    assert f"success, {SMALL}, round 0" in rows
    assert rows[f"success, {SMALL}, round 1"]["value"] == pytest.approx(0.3)
    assert rows[f"success, {SMALL}, round 1"]["cpu_seconds"] == 30.0
    assert configuration(SMALL, 0).simulator.conversations == configuration(OURS, 0).simulator.conversations // 3
