"""What a fitted Q is about and worth, outcome by outcome, as its stage writes it and the report shows it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import StoreError
from iterative_ppo.evaluation.doubts import doubts
from iterative_ppo.evaluation.metrics import Calibration, auc, calibration, r_squared
from iterative_ppo.files import read_json, write_json
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.objective import WITHOUT_COST
from iterative_ppo.learning.policy_evaluation import Round, fit_q
from iterative_ppo.learning.q_model import QModel
from iterative_ppo.learning.rounds import round_of
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.turn_table import to_frame
from iterative_ppo.report import q_plots, svg
from iterative_ppo.report.page import render
from iterative_ppo.report.record import RunRecord
from tasks.datasets import Dataset
from tasks.learning import PolicyVersion, fit_q_stage
from tasks.q_report import forecast, judged, outcome_report, q_report, write_q_report

torch.set_num_threads(1)
BOTH = {"purchase": 1.0, "contact": 0.5}
QUICK: dict[str, Any] = {"q.epochs": 0.5, "q.value_epochs": 0.5, "q.replay_rounds": 0, "exploration.share": 0.0}


def config_of(**changes: Any) -> Config:
    return load_config(None, {**QUICK, "outcomes": BOTH, **changes})


def two_outcomes(scripted: list[Conversation]) -> list[Conversation]:
    """The scripted conversations, every third of which leaves contact details."""
    talks = []
    for k, talk in enumerate(scripted):
        *acted, last = talk.turns
        turns = [replace(turn, outcomes=(0.0, 0.0)) for turn in acted]
        ending = replace(last, outcomes=(last.outcomes[0], float(k % 3 == 0)))
        said = "bye" if any(ending.outcomes) else None
        talks.append(replace(talk, turns=(*turns, replace(ending, customer_message=said))))
    return talks


@dataclass(frozen=True)
class Fitted:
    """A Q with two heads, and the data that it was fitted to."""

    frame: pd.DataFrame
    data: Round
    q: QModel


@pytest.fixture(scope="module")
def fitted(tiny_policy: LanguagePolicy, scripted: list[Conversation]) -> Fitted:
    frame, config = to_frame(two_outcomes(scripted), BOTH, 0.4), config_of()
    data = round_of(tiny_policy, frame, config)
    return Fitted(frame, data, fit_q(tiny_policy, data, [], config))


# --- figures ---------------------------------------------------------------------------------------------------------


def test_each_outcome_is_judged_by_its_own_head_and_returns(fitted: Fitted) -> None:
    found = outcome_report(fitted.q, fitted.data, fitted.frame)
    assert list(found) == list(BOTH) and [one["weight"] for one in found.values()] == [1.0, 0.5]
    heads = fitted.q.head_values(fitted.data.encoded)
    held = ~fitted.data.fit & np.isfinite(heads.q[:, 0])
    ends = fitted.frame.groupby("conversation_id")["outcome_contact"].transform("max").to_numpy(float)
    assert fitted.data.outcome_returns is not None
    truth, said = fitted.data.outcome_returns[held, 1], heads.q[held, 1]
    figures = found["contact"]["metrics"]
    assert figures["r2"] == pytest.approx(r_squared(truth, said)) and figures["auc"] == auc(ends[held] > 0, said)
    assert figures["state_only_r2"] == pytest.approx(r_squared(truth, heads.v[held, 1]))
    ids = fitted.frame["conversation_id"].to_numpy(str)[held]
    assert found["contact"]["calibration"]["error"] == pytest.approx(calibration(said, truth, ids).error)
    assert figures["calibration_error"] == found["contact"]["calibration"]["error"]


def test_of_several_members_an_outcome_is_told_by_those_that_improvement_sees(fitted: Fitted) -> None:
    q = QModel.from_policy(fitted.q, replace(fitted.q.settings, members=2, judges=1), 3)
    heads, named = q.head_values(fitted.data.encoded), q.outcome_values(fitted.data.encoded)
    assert np.allclose(named.q, (heads.q[:, :2] + heads.q[:, 2:4]) / 2, equal_nan=True)
    assert np.allclose(named.v @ [1.0, 0.5], q.evaluate(fitted.data.encoded).v, atol=1e-6, equal_nan=True)


def test_pessimism_is_no_broken_promise(fitted: Fitted) -> None:
    """It says less on purpose, to improvement; what is promised is what the members say."""
    q = QModel.from_policy(fitted.q, replace(fitted.q.settings, members=3), 3)
    careful = q.with_settings(pessimism=2.0)
    (plain, bins), (figures, others) = (q_report(one, fitted.data, fitted.frame) for one in (q, careful))
    assert bins == others and plain["calibration_error"] == figures["calibration_error"]
    assert plain["r2"] != figures["r2"]


def test_the_whole_q_is_calibrated_over_the_range_of_the_weighted_sum(fitted: Fitted) -> None:
    """Up to 1.5, and not cut at 1, the most that one outcome can be."""
    _, bins = q_report(fitted.q, fitted.data, fitted.frame)
    values = fitted.q.evaluate(fitted.data.encoded)
    held = ~fitted.data.fit & np.isfinite(values.q)
    assert fitted.data.returns[held].max() > 1.0
    count = np.array(bins["count"])
    assert np.array(bins["observed"]) @ count / count.sum() == pytest.approx(fitted.data.returns[held].mean() / 1.5)
    assert np.array(bins["predicted"]) @ count / count.sum() == pytest.approx(values.q[held].mean() / 1.5, rel=1e-4)


def test_the_forecast_is_held_against_the_undiscounted_outcome(fitted: Fitted) -> None:
    said = forecast(fitted.q, fitted.data, fitted.frame)
    assert set(said) == {"as_it_is", "isotonic", "temperature"}
    held = ~fitted.data.fit & ~fitted.data.last
    ends = fitted.frame.groupby("conversation_id")["outcome"].transform("max").to_numpy(float)[held] / 1.5
    for one in said.values():
        count = np.array(one.count)
        assert np.array(one.observed) @ count / count.sum() == pytest.approx(ends.mean())
    assert said["isotonic"].predicted != said["as_it_is"].predicted


def test_a_named_outcome_of_one_class_and_a_forecast_that_cannot_be_told_are_doubted(
    fitted: Fitted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = ~fitted.data.fit
    frame = fitted.frame.assign(outcome_contact=fitted.frame["outcome_contact"].mask(held, 0.0))
    metrics = write_q_report(fitted.q, fitted.data, frame, tmp_path)
    conversations = frame["conversation_id"][held].nunique()
    assert f"0 of {conversations} held-out conversations reached outcome 'contact'" in caplog.text
    assert metrics["held_out_successes_contact"] == metrics["forecast_untold"] == 0
    talks = frame["conversation_id"][held].unique()
    kept = frame["conversation_id"].isin(talks[:3]).to_numpy() | fitted.data.fit
    few = replace(fitted.data, fit=~(held & kept))
    won = frame.assign(outcome=np.where(frame["conversation_id"] == talks[0], 1.0, 0.0))
    metrics = write_q_report(fitted.q, few, won, tmp_path)
    assert metrics["forecast_untold"] == 1 and "1 of 3 held-out conversations succeeded, too few" in caplog.text


def test_what_is_judged_is_what_q_promises_and_no_map_onto_the_outcomes_themselves(
    fitted: Fitted, tmp_path: Path
) -> None:
    metrics = write_q_report(fitted.q, fitted.data, fitted.frame, tmp_path)
    bins = Calibration(**read_json(tmp_path / "calibration.json"))
    assert judged(tmp_path) == bins and metrics["calibration_error"] == bins.error
    assert metrics["calibration_error_by_chance_95"] == bins.chance_95
    assert metrics["forecast_error_isotonic"] == forecast(fitted.q, fitted.data, fitted.frame)["isotonic"].error
    held = ~fitted.data.fit & np.isfinite(values := fitted.q.evaluate(fitted.data.encoded).q)
    ids = fitted.frame["conversation_id"].to_numpy(str)[held]
    assert bins.error == pytest.approx(calibration(values[held] / 1.5, fitted.data.returns[held] / 1.5, ids).error)


def test_of_turns_that_are_paid_by_themselves_there_is_no_ending_to_forecast(fitted: Fitted, tmp_path: Path) -> None:
    at_once = replace(fitted.data, returns=fitted.data.reward)
    write_q_report(fitted.q, at_once, fitted.frame, tmp_path / "one turn each")
    assert (tmp_path / "one turn each" / "forecast.json").exists()
    myopic = replace(at_once, outcome_returns=None, outcome_rewards=None)
    q = QModel.from_policy(fitted.q, replace(fitted.q.settings, outcomes={"acceptance": 1.0}), 0)
    metrics = write_q_report(q, myopic, fitted.frame, tmp_path)
    assert not (tmp_path / "forecast.json").exists()
    assert metrics["calibration_error"] == read_json(tmp_path / "calibration.json")["error"]


def test_of_costs_alone_a_success_is_a_conversation_without_any(fitted: Fitted, tmp_path: Path) -> None:
    held = ~fitted.data.fit
    ends = fitted.frame.groupby("conversation_id")["outcome_purchase"].transform("max").to_numpy(float)
    last = turn_table.last_rows(fitted.frame)
    frame = fitted.frame.assign(outcome=np.where(last, -ends, 0.0), outcome_purchase=np.where(last, ends, 0.0))
    metrics, _ = q_report(fitted.q, fitted.data, frame, WITHOUT_COST)
    without = frame["conversation_id"][held & (ends == 0)].nunique()
    assert 0 < metrics["held_out_successes"] == without < metrics["held_out_conversations"]
    values = fitted.q.evaluate(fitted.data.encoded).q
    shown = held & np.isfinite(values)
    assert metrics["auc"] == auc(ends[shown] == 0, values[shown])


def test_an_evidence_part_that_ends_alike_is_told_with_its_figure(
    fitted: Fitted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = ~fitted.data.fit
    lost = replace(fitted.data, reward=np.where(held, 0.0, fitted.data.reward))
    frame = fitted.frame.assign(outcome=fitted.frame["outcome"].mask(held, 0.0))
    with caplog.at_level(logging.WARNING, "tasks.q_report"):
        metrics = write_q_report(fitted.q, lost, frame, tmp_path)
    conversations = frame["conversation_id"][held].nunique()
    assert f"all {conversations} held-out conversations failed" in caplog.text
    assert "raise data.evidence_share" in caplog.text
    assert np.isnan(metrics["auc"]) and not (tmp_path / "forecast.json").exists()
    assert list(doubts({"held_out_conversations": 9.0, "held_out_successes": 4.0, "fit_turns": 50.0})) == []
    assert list(doubts({"r2": -0.02})) == []
    (line,) = doubts({"r2": -188.0})
    assert "its R2 there is -188.00" in line and "data.outcome_ranges" in line
    assert list(doubts({"fit_share_beyond_iterations": 0.05, "fit_longest_conversation": 31.0})) == []


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ({"held_out_conversations": 0.0, "held_out_successes": 0.0}, "no conversation is held out"),
        ({"held_out_conversations": 7.0, "held_out_successes": 7.0}, "all 7 held-out conversations succeeded"),
        (
            {"held_out_conversations": 7.0, "held_out_successes": 7.0, "forecast_error_isotonic": 0.1},
            "all 7 held-out conversations succeeded: the AUC of Q cannot be told",
        ),
        (
            {"held_out_conversations": 70.0, "held_out_successes": 1.0, "forecast_untold": 1.0},
            "1 of 70 held-out conversations succeeded, too few to hold Q against",
        ),
        (
            {"held_out_conversations": 70.0, "held_out_successes": 30.0, "held_out_successes_contact": 70.0},
            "70 of 70 held-out conversations reached outcome 'contact': the AUC of its Q cannot be told",
        ),
        (
            {"fit_share_beyond_iterations": 0.12, "fit_longest_conversation": 31.0},
            "12% of the conversations that Q was fitted to have more turns than q.iterations, up to 31",
        ),
        ({"fit_turns": 4000.0, "fit_turns_without_logprob": 1200.0}, "1,200 of 4,000 logged suggestions have no behav"),
        (
            {"fit_turns": 40.0, "fit_constant_outcomes": 1.0},
            "1 named outcome is the same in the conversations of all 40 turns",
        ),
    ],
)
def test_every_doubt_names_its_figure_and_a_remedy(figures: dict[str, float], said: str) -> None:
    (line,) = doubts(figures)
    assert line.startswith(said) and "; " in line


# --- new weights -----------------------------------------------------------------------------------------------------


def test_new_weights_need_no_new_fit(
    tiny_policy: LanguagePolicy, scripted: list[Conversation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_policy.save(tmp_path / "policy")
    frame = to_frame(two_outcomes(scripted[:30]), BOTH, 0.4)
    turn_table.write(frame, tmp_path / "turns" / "turns.parquet", BOTH)
    policy, dataset = PolicyVersion(1, tmp_path / "policy", "script"), Dataset(0, tmp_path / "turns", "md5")

    def stage(**changes: Any) -> Any:
        return fit_q_stage(
            config_of(**{"data.root": tmp_path / "data", **changes}), policy, dataset, tmp_path / "round"
        )

    first = stage()
    assert not [path for path in first.path.iterdir() if path.name.startswith(".")], "the tokens' file is gone"
    before, told = QModel.load(first.path / "model"), read_json(first.path / "outcomes.json")
    fits = counted(monkeypatch)
    priced = {"contact": 3.0, "purchase": -1.0}
    second = stage(outcomes=priced)
    assert fits == [] and second.key != first.key and second.metrics["fit_turns"] == first.metrics["fit_turns"]
    after = QModel.load(second.path / "model")
    assert after.settings.outcomes == {"purchase": -1.0, "contact": 3.0}
    pairs = zip(before.model.parameters(), after.reweighted(BOTH).model.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
    r = dataset.read(config_of(outcomes=priced))
    assert (r["outcome"] == 3.0 * r["outcome_contact"] - r["outcome_purchase"]).all(), "R is under today's weights"
    again = read_json(second.path / "outcomes.json")
    assert again["contact"]["weight"] == 3.0
    for name in BOTH:
        assert again[name]["metrics"] == pytest.approx(told[name]["metrics"]), "each outcome beside its own returns"
    stage(outcomes=priced, **{"q.epochs": 1.0})
    assert len(fits) == 1, "anything else that is new is a new fit"
    stage(outcomes=priced, **{"q.epochs": 1.0, "data.outcome_high": 2.0})
    assert len(fits) == 2, "the range of outcomes is Q's"
    stage(outcomes=BOTH, **{"q.outcome_heads": False})
    stage(outcomes=priced, **{"q.outcome_heads": False})
    assert len(fits) == 4, "one head for the weighted sum knows nothing of its parts"


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which every fit of Q adds itself from now on."""
    from iterative_ppo.learning import rounds

    fits: list[str] = []
    fit = rounds.fit_q

    def counting(*args: Any, **named: Any) -> QModel:
        fits.append("fit")
        return fit(*args, **named)

    monkeypatch.setattr(rounds, "fit_q", counting)
    return fits


# --- the report ------------------------------------------------------------------------------------------------------

CREDIT = {
    "objective_is_credited": 1.0,
    "credit_kendall_tau": 0.631,
    "credit_held_out_conversations": 175.0,
    "credit_conversations_without_suggestion": 2.0,
    "credit_conversations_of_others_left_out": 1200.0,
    "credit_turn_rank_stability": 0.612,
    "credit_token_rank_stability": 0.557,
}
OBJECTIVE = "Q is fitted to the turn rewards of norm_itpo, not to the outcome: and so on"
BINS = {"predicted": [0.1, 0.6], "observed": [0.2, 0.5], "count": [50, 50], "error": 0.083, "chance_95": 0.047}


def stage_of_q(root: Path, number: int, **inputs: Any) -> Path:
    folder = root / "rounds" / f"{number:04d}"
    (folder / "validated").mkdir(parents=True)
    write_json(folder / "q" / "stage.json", {"key": "k", "inputs": inputs, "metrics": {"r2": 0.2}, "content": "c"})
    return folder / "q"


def credited_round(root: Path, number: int) -> Path:
    folder = stage_of_q(root, number, credit={"assigner": "norm_itpo"})
    write_json(folder / "credit.json", {"objective": OBJECTIVE, "metrics": CREDIT})
    return folder


def page_of(root: Path) -> str:
    return " ".join(unescape(render(RunRecord.read(root))).split())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(svg, "inline", lambda figure, _: figure)
    yield


def test_a_credited_objective_is_shown_with_its_figures(tmp_path: Path) -> None:
    stage_of_q(tmp_path, 0)
    assert 'id="credit"' not in page_of(tmp_path)
    credited_round(tmp_path, 1)
    said = page_of(tmp_path)
    assert f"{OBJECTIVE}.</p>" in said
    cells = "<td>0.612</td><td>0.557</td><td>0.631</td><td>175</td><td>1,200</td><td>2</td>"
    assert f'<td class="left">1</td><td class="left">Norm-ITPO</td>{cells}' in said
    assert "rank stability, turns" in said and "rank stability, tokens" in said


def test_stabilities_are_drawn_by_round(tmp_path: Path, drawn: None) -> None:
    for number in (0, 1):
        credited_round(tmp_path, number)
    figure: Any = q_plots.credit(RunRecord.read(tmp_path))
    found = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert found == {
        "rank stability, turns": [0.612, 0.612],
        "rank stability, tokens": [0.557, 0.557],
        "Kendall's tau": [0.631, 0.631],
    }


def test_where_nothing_could_be_ranked_the_table_stands_alone(tmp_path: Path) -> None:
    folder = credited_round(tmp_path, 0)
    write_json(folder / "credit.json", {"objective": OBJECTIVE, "metrics": {"objective_is_credited": 1.0}})
    said = page_of(tmp_path)
    assert 'id="credit"' in said and "rank stability, turns" not in said and "<td>–</td>" in said


@pytest.mark.parametrize("name", ["credit.json", "outcomes.json", "forecast.json"])
def test_damage_names_the_file(tmp_path: Path, name: str) -> None:
    folder = credited_round(tmp_path, 0)
    write_json(folder / name, ["another", "shape"])
    with pytest.raises(StoreError, match=str(folder / name)):
        RunRecord.read(tmp_path)


def test_the_forecast_is_drawn_as_it_is_and_calibrated(tmp_path: Path, drawn: None) -> None:
    folder = stage_of_q(tmp_path, 0)
    assert q_plots.forecast(RunRecord.read(tmp_path)) is None
    mapped = {**BINS, "predicted": [0.2, 0.5], "error": 0.011}
    write_json(folder / "forecast.json", {"as_it_is": BINS, "isotonic": mapped, "temperature": BINS})
    figure: Any = q_plots.forecast(RunRecord.read(tmp_path))
    found = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].lines}
    assert found["Q as it is"] == [[0.1, 0.2], [0.6, 0.5]] and found["isotonic"] == [[0.2, 0.2], [0.5, 0.5]]


def test_the_forecast_says_where_it_errs_more_than_chance(tmp_path: Path) -> None:
    folder = stage_of_q(tmp_path, 0)
    mapped = {**BINS, "error": 0.011}
    write_json(folder / "forecast.json", {"as_it_is": BINS, "isotonic": mapped, "temperature": BINS})
    assert "Q as it is: 0.083 (0.047, so more than chance); isotonic: 0.011 (0.047);" in page_of(tmp_path)


def a_tested_run(root: Path, outcomes: dict[str, float]) -> None:
    """Two rounds, the second on the first one's A/B test: 20 conversations an arm."""
    from test_report import Fake, row, talks

    from iterative_ppo.evaluation.ab_test import Arm, ab_test

    arms = Arm(5, 20), Arm(15, 20)
    data = [talk for pair in zip((1, 2), ("champion", "challenger"), arms, strict=True) for talk in talks(*pair, 3)]
    several = [
        replace(
            talk,
            turns=tuple(
                replace(turn, outcomes=(*turn.outcomes, float(turn is talk.turns[-1] and k % 4 == 0)))
                for turn in talk.turns
            ),
        )
        for k, talk in enumerate(data)
    ]
    fake = Fake(root)
    for number in (0, 1):
        folder = fake.folder(number) / "validated"
        write_json(folder / "validation.json", {"quarantined_conversations": 0, "reasons": {}, "warnings": []})
    frame = to_frame(several if len(outcomes) > 1 else data, outcomes, 0.2)
    turn_table.write(frame, root / "turns" / "round=0001" / "turns.parquet", outcomes)
    fake.state("train", 1, [row(0, 1, {"verdict": "test", "reasons": []}, ab_test(*arms, 0.05))])
    stage_of = fake.folder(1) / "q"
    write_json(stage_of / "stage.json", {"key": "k", "inputs": {}, "metrics": {}, "content": "c"})
    each = {"weight": 0.5, "metrics": {"r2": 0.21, "auc": 0.812, "calibration_error": 0.083}, "calibration": BINS}
    write_json(stage_of / "outcomes.json", dict.fromkeys(outcomes, each))


def test_each_outcome_has_its_own_result_with_customers_and_its_own_q(tmp_path: Path) -> None:
    a_tested_run(tmp_path, BOTH)
    said = page_of(tmp_path)
    half = 1.96 * (2 * 0.25 * 0.75 / 20) ** 0.5
    row = f'<td>0.250</td><td>0.750</td><td>+0.500<span class="sub">+{0.5 - half:.3f} to +{0.5 + half:.3f}</span>'
    assert f'<td class="left">purchase</td>{row}' in said
    assert '<td class="left">contact</td><td>0.250</td><td>0.250</td><td>+0.000' in said
    assert '<td class="left">1</td><td class="left">contact</td><td>0.5</td><td>0.210' in said


def test_one_outcome_needs_no_section_of_its_own(tmp_path: Path) -> None:
    a_tested_run(tmp_path, {"purchase": 1.0})
    assert 'id="outcomes"' not in page_of(tmp_path)
