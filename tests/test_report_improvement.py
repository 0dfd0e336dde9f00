"""The report says by which passes a challenger was improved, draws what they did, and what Q says that came of it."""

from __future__ import annotations

from dataclasses import dataclass
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from iterative_ppo.config import load_config
from iterative_ppo.errors import StoreError
from iterative_ppo.files import write_json
from iterative_ppo.report import svg, technical_plots
from iterative_ppo.report.page import render
from iterative_ppo.report.record import RunRecord

Curve = list[dict[str, float]]
ROLLOUTS: Curve = [
    {"q": 0.2 + 0.05 * k, "kl_to_reference": 0.1 * k, "kl_to_champion": 0.3 * k, "entropy": 1.2 - 0.1 * k}
    for k in range(4)
]
JUDGED: Curve = [{**entry, "judge": judge} for entry, judge in zip(ROLLOUTS, (0.20, 0.24, 0.26, 0.21), strict=True)]
UPDATES: Curve = [{"loss": 2.0 - 0.002 * k, "gradient_norm": 0.5} for k in range(600)]
RISEN = {"states": 400, "q_champion": 0.21, "q_challenger": 0.26, "q_gain_low": 0.04, "q_gain_high": 0.06}


@dataclass(frozen=True)
class Run:
    """A run folder in which rounds have been improved, and perhaps compared with their champions."""

    root: Path

    def improved(
        self,
        number: int,
        curves: dict[str, Curve],
        algorithm: str = "ppo",
        metrics: dict[str, float] | None = None,
        **evidence: float,
    ) -> None:
        folder = self.root / "rounds" / f"{number:04d}"
        (folder / "validated").mkdir(parents=True)
        config = load_config(overrides={"improve.algorithm": algorithm}).improve
        stage = {"key": "k", "inputs": {"improve": config.model_dump()}, "metrics": metrics or {}, "content": "c"}
        write_json(folder / "improved" / "stage.json", stage)
        write_json(folder / "improved" / "curves.json", curves)
        if evidence:
            write_json(folder / "gate" / "evidence.json", {**evidence, "guardrails": []})

    @property
    def record(self) -> RunRecord:
        return RunRecord.read(self.root)

    @property
    def page(self) -> str:
        return unescape(render(self.record))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots are left as figures, whose lines can be asked for their data."""
    monkeypatch.setattr(svg, "inline", lambda figure, _: figure)


def lines(figure: Any, panel: int = 0) -> dict[str, np.ndarray]:
    """(N, 2) points of a panel's lines, by label."""
    assert isinstance(figure, Figure)
    return {str(line.get_label()): line.get_xydata() for line in figure.axes[panel].lines}  # type: ignore[misc]


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passes", "said"),
    [
        (["best_of_n", "ppo"], "Improved by best of 8 by Q, then PPO<"),
        (["logged", "best_of_n", "grpo"], "Improved by the logged pass, then best of 8 by Q, then GRPO<"),
        (["rloo"], "Improved by RLOO<"),
        (["best_of_n"], "Improved by best of 8 by Q<"),
        ([], "No pass was configured: the challenger is the champion unchanged<"),
    ],
)
def test_the_passes_that_ran_are_named_in_their_order(run: Run, passes: list[str], said: str) -> None:
    run.improved(0, {name: UPDATES if name in ("logged", "best_of_n") else ROLLOUTS for name in passes})
    assert said in run.page


def test_several_policy_iterations_are_told_with_what_the_data_are_worth_to_each(run: Run) -> None:
    metrics = {"policy_iterations": 2.0, "iteration_2_fit_effective_size": 963.6}
    run.improved(0, {"best_of_n": UPDATES, "ppo": ROLLOUTS}, metrics=metrics)
    assert "best of 8 by Q, then PPO, 2 policy iterations on the same conversations<" in run.page
    assert "For Q of policy iteration 2 they are worth 964 suggestions of its own (effective sample size)<" in run.page


def test_a_policy_iteration_that_was_left_out_is_told(run: Run) -> None:
    run.improved(0, {"ppo": ROLLOUTS}, metrics={"policy_iterations": 1.0, "iteration_left_out": 2.0})
    assert "Policy iteration 2 left out: the conversations tell too little of the policy by then<" in run.page


def test_a_round_that_is_not_improved_yet_says_nothing_of_it(run: Run) -> None:
    (run.root / "rounds" / "0000" / "validated").mkdir(parents=True)
    assert "Improved by" not in run.page and "No pass was" not in run.page
    assert run.record.rounds[0].algorithm is None


def test_the_record_carries_the_configured_algorithm(run: Run) -> None:
    run.improved(0, {"best_of_n": UPDATES}, algorithm="rloo")
    (one,) = run.record.rounds
    assert one.settings["improved"]["improve"]["algorithm"] == "rloo"
    assert (one.algorithm, one.candidates) == (None, 8)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "E[Q] on 400 held-out states rose from 0.210 to 0.260: +0.050 (95% interval +0.040 to +0.060)"),
        (
            {"q_gain_low": -0.01, "q_gain_high": 0.11},
            "rose from 0.210 to 0.260: +0.050 (95% interval −0.010 to +0.110, so it may be chance)",
        ),
        (
            {"q_challenger": 0.18, "q_gain_low": -0.05, "q_gain_high": -0.01},
            "fell from 0.210 to 0.180: −0.030 (95% interval −0.050 to −0.010)",
        ),
    ],
)
def test_what_came_of_it_is_said_with_its_interval(run: Run, changes: dict[str, float], said: str) -> None:
    run.improved(0, {"ppo": ROLLOUTS}, **(RISEN | changes))
    assert said in run.page


def test_without_a_measurement_no_rise_is_claimed(run: Run) -> None:
    run.improved(0, {"ppo": ROLLOUTS}, states=400, q_champion=0.2, q_challenger=0.3)
    assert "E[Q] on" not in run.page


def test_settings_of_another_shape_name_their_file(run: Run) -> None:
    run.improved(0, {"ppo": ROLLOUTS})
    path = run.root / "rounds" / "0000" / "improved" / "stage.json"
    write_json(path, {"inputs": {"improve": {"best_of_n": {"samples": "many"}}}})
    with pytest.raises(StoreError, match=str(path)):
        _ = run.record


# --- plots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ppo", "grpo", "rloo"])
def test_the_algorithm_that_ran_is_drawn_under_its_name(run: Run, drawn: None, algorithm: str) -> None:
    run.improved(0, {algorithm: ROLLOUTS}, algorithm)
    found = lines(technical_plots.curves(run.record))
    assert found["round 0"].tolist() == pytest.approx(np.array([(k + 1, 0.2 + 0.05 * k) for k in range(4)]))


def test_each_policy_iteration_has_a_line_of_its_own_and_judges_speak_of_the_last(run: Run, drawn: None) -> None:
    run.improved(0, {"ppo": [{**entry, "iteration": 1.0 + k // 2} for k, entry in enumerate(JUDGED)]})
    figure = technical_plots.curves(run.record)
    assert isinstance(figure, Figure)
    points = [line.get_xydata()[:, 0].tolist() for line in figure.axes[0].lines]  # type: ignore[call-overload, index]
    assert points == [[1.0, 2.0], [3.0, 4.0]]
    judged = lines(technical_plots.judges(run.record))
    assert judged["judges"] == pytest.approx(np.array([(0.6, 0.26), (0.9, 0.21)]))


def test_rounds_of_several_algorithms_are_told_apart(run: Run) -> None:
    run.improved(0, {"best_of_n": UPDATES, "ppo": ROLLOUTS})
    assert "<h3>PPO, rollout by rollout</h3>" in run.page
    run.improved(1, {"best_of_n": UPDATES, "grpo": ROLLOUTS}, "grpo")
    assert "<h3>PPO and GRPO, rollout by rollout</h3>" in run.page
    assert "round 0, PPO" in run.page and "round 1, GRPO" in run.page


def test_a_round_without_episodes_has_no_rollouts_to_draw(run: Run) -> None:
    run.improved(0, {"best_of_n": UPDATES})
    assert "rollout by rollout" not in run.page
    assert "Passes over given answers" in run.page


def test_losses_are_means_over_neighbouring_updates(run: Run, drawn: None) -> None:
    run.improved(0, {"logged": UPDATES[:5], "best_of_n": UPDATES})
    figure = technical_plots.losses(run.record)
    logged, best = (lines(figure, panel)["round 0"] for panel in (0, 1))
    assert logged == pytest.approx(np.array([(k + 1, 2.0 - 0.002 * k) for k in range(5)]))
    assert best == pytest.approx(np.array([(5.5 + 10 * k, 2.0 - 0.002 * (4.5 + 10 * k)) for k in range(60)]))


def test_judges_are_drawn_beside_q_over_kl_with_a_ring_where_they_are_highest(run: Run, drawn: None) -> None:
    run.improved(0, {"ppo": ROLLOUTS})
    assert technical_plots.judges(run.record) is None
    run.improved(1, {"rloo": JUDGED}, "rloo")
    figure: Any = technical_plots.judges(run.record)
    found, (panel,) = lines(figure), figure.axes
    assert found["Q, as improved on"] == pytest.approx(np.array([(0.3 * k, 0.2 + 0.05 * k) for k in range(4)]))
    assert found["judges"] == pytest.approx(np.array([(0.0, 0.2), (0.3, 0.24), (0.6, 0.26), (0.9, 0.21)]))
    assert panel.get_title(loc="left") == "Round 1, RLOO"
    assert [line.get_xydata().tolist() for line in panel.lines if line.get_marker() == "o"][-1] == [
        pytest.approx([0.6, 0.26])
    ]


def test_the_page_shows_the_judges_where_there_are_any(run: Run) -> None:
    run.improved(0, {"ppo": ROLLOUTS})
    assert "Is Q's praise deserved?" not in run.page
    run.improved(1, {"ppo": JUDGED})
    assert "Is Q's praise deserved?" in run.page
