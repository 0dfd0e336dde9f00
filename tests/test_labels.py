"""Outcomes by rule or classifier: only where nobody reported one, each with its origin, the same however often."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from policy_store import copied
from safetensors.numpy import load_file, save_file

from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import ConfigError, StoreError, TrainingError
from iterative_ppo.evaluation.doubts import label_doubts
from iterative_ppo.files import read_json
from iterative_ppo.learning.outcome_classifier import OutcomeClassifier, fit_outcome_classifier, least_costly
from iterative_ppo.mdp.conversation import Conversation, Suggestion, Turn
from iterative_ppo.mdp.labels import as_reported, by_rule, counts, transcripts, unreported, with_labels
from iterative_ppo.mdp.turn_table import ORIGIN, conform, read, to_frame, write
from iterative_ppo.report.record import RunRecord
from iterative_ppo.report.round_record import read_round
from iterative_ppo.report.rows import round_row
from iterative_ppo.sources.table import import_table
from tasks import labels, looks, model_versions, registry, rounds
from tasks.datasets import arrived, round_folder, write_once
from tasks.rounds import RoundContext
from tasks.validation import validate

OUTCOMES = {"purchase": 1.0}
RULE = {"side": "customer", "pattern": r"(?i)\bdeal\b", "first_turn": 1, "last_turn": None, "value": 1.0}
GOOD, BAD = ("that is lovely", "wonderful indeed"), ("too expensive", "no thanks then")


def talk(name: str, *said: str | None, origin: str | None = None, won: float = 0.0, **more: Any) -> Conversation:
    """Customer messages, each answered with the suggestion "and so?"; the last is the terminal row's."""
    acted = [Turn(c, (0.0,), Suggestion("and so?", "suggested", -1.0), "and so?", "verbatim") for c in said[:-1]]
    turns = (*acted, Turn(said[-1], (won,)))
    return Conversation(name, turns, f"customer-{name}", policy_version="1", outcome_origin=origin, **more)


def frame_of(*talks: Conversation) -> pd.DataFrame:
    return to_frame(talks, OUTCOMES, 0.3)


def talks(count: int, reported: float, seed: int = 0, noise: float = 0.0) -> list[Conversation]:
    """Half of them end well, which words tell but for `noise`; a share `reported` says how, the others nothing."""
    rng = np.random.default_rng(seed)
    made = []
    for k in range(count):
        won, known = bool(rng.random() < 0.5), bool(rng.random() < reported)
        words = (GOOD if won != (rng.random() < noise) else BAD)[int(rng.integers(2))]
        outcome, origin = (float(won), "reported") if known else (0.0, None)
        made.append(talk(f"{seed}-{k:04d}", "hello", words, None, origin=origin, won=outcome))
    return made


def ends(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop_duplicates("conversation_id", keep="last").set_index("conversation_id")


# --- where a label comes from ----------------------------------------------------------------------------------------


def test_a_table_without_origins_is_one_of_reported_outcomes(tmp_path: Path) -> None:
    frame = frame_of(talk("a", "hi", None, origin="reported")).drop(columns=ORIGIN)
    assert conform(frame, OUTCOMES)[ORIGIN].tolist() == ["reported"] * 2


def test_origins_survive_the_file(tmp_path: Path) -> None:
    given = frame_of(
        talk("a", "hi", None), talk("b", "hi", None, origin="rule"), talk("c", "hi", None, origin="reported")
    )
    write(given, tmp_path / "t.parquet", OUTCOMES)
    again = read(tmp_path / "t.parquet", OUTCOMES)
    pd.testing.assert_frame_equal(again, given)
    assert counts(again) == {"none": 1, "rule": 1, "reported": 1}


def test_an_outcome_without_an_origin_was_reported_and_a_null_without_one_is_none() -> None:
    frame = frame_of(talk("paid", "hi", "yes", won=1.0), talk("unknown", "hi", None))
    frame.loc[frame["conversation_id"] == "unknown", "outcome_purchase"] = np.nan
    table = ends(as_reported(frame, OUTCOMES))
    assert table.loc["paid", ORIGIN] == "reported" and pd.isna(table.loc["unknown", ORIGIN])
    assert table["outcome"].to_dict() == {"paid": 1.0, "unknown": 0.0}


@pytest.mark.parametrize(("last", "origin"), [("0", "reported"), ("1", "reported"), ("", None)])
def test_a_log_reports_where_its_last_row_says_an_outcome(tmp_path: Path, last: str, origin: str | None) -> None:
    lines = ["conversation_id,turn,customer_message,suggestion,business_message,outcome"]
    lines += ["a,1,hi,hello,hello,0", f"a,2,bye,so,so,{last}"]
    (tmp_path / "log.csv").write_text("\n".join(lines))
    (found,) = import_table(tmp_path / "log.csv", OUTCOMES, load_config().data).conversations
    assert found.outcome_origin == origin


# --- by rule ---------------------------------------------------------------------------------------------------------


def ruled(frame: pd.DataFrame, **changes: Any) -> pd.DataFrame:
    config = load_config(overrides={"labels.kind": "rule", "labels.rules": {"purchase": {**RULE, **changes}}})
    return labels.judged(frame, config)


def test_a_null_beside_a_reported_outcome_is_0() -> None:
    """As a logger leaves rows until a sale comes: the sale must not be lost for the nulls before it."""
    frame = pd.DataFrame({
        "conversation_id": ["a", "a", "b", "b"],
        "outcome_sold": [np.nan, 1.0, np.nan, np.nan],
        "outcome_rated": [np.nan, np.nan, np.nan, np.nan],
        "outcome_origin": pd.array([None, None, "reported", "reported"], dtype="string"),
    })  # fmt: skip
    found = as_reported(frame, {"sold": 1.0, "rated": 0.5})
    assert found["outcome"].tolist()[:2] == [0.0, 1.0] and found["outcome_rated"].tolist()[:2] == [0.0, 0.0]
    assert found["outcome"][2:].isna().all(), "a report that says nothing is one that validation has to see"


def test_a_rule_labels_what_nobody_reported_and_nothing_else() -> None:
    frame = frame_of(
        talk("found", "hi", "it's a DEAL", None),
        talk("absent", "hi", "an ideal room", None),
        talk("denied", "a deal?", None, origin="reported"),
        talk("sold", "hi", "yes", origin="reported", won=1.0),
    )
    table = ends(ruled(frame))
    assert table["outcome"].to_dict() == {"found": 1.0, "absent": 0.0, "denied": 0.0, "sold": 1.0}
    assert table[ORIGIN].to_dict() == {"found": "rule", "absent": "rule", "denied": "reported", "sold": "reported"}
    pd.testing.assert_frame_equal(ruled(ruled(frame)), ruled(frame))
    assert (ruled(frame).groupby("conversation_id")["outcome"].sum() <= 1.0).all(), "in the last row alone"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, {"one", "two", "end"}),
        ({"last_turn": 1}, {"one"}),
        ({"first_turn": 2}, {"two", "end"}),
        ({"first_turn": 2, "last_turn": 2}, {"two"}),
        ({"first_turn": 3}, {"end"}),
        ({"side": "business"}, set()),
        ({"pattern": "(?i)(DE)(al)"}, {"one", "two", "end"}),
        ({"side": "business", "pattern": "and so"}, {"one", "two", "end"}),
    ],
)
def test_a_rule_looks_at_its_side_and_turns(changes: dict[str, Any], found: set[str]) -> None:
    frame = frame_of(talk("one", "deal", "b", None), talk("two", "a", "deal", None), talk("end", "a", "b", "deal"))
    table = ends(ruled(frame, **changes))
    assert set(table.index[table["outcome"] > 0]) == found


def test_each_outcome_has_its_own_rule_and_value() -> None:
    given = {**OUTCOMES, "contact": 0.5}
    rules = {"purchase": RULE, "contact": {**RULE, "pattern": "call me", "value": 0.8}}
    overrides = {"outcomes": given, "labels.kind": "rule", "labels.rules": rules}
    acted = Turn("call me", (0.0, 0.0), Suggestion("ok", "suggested"), "ok", "verbatim")
    frame = to_frame([Conversation("a", (acted, Turn(None, (0.0, 0.0))), "u", outcome_origin=None)], given, 0.3)
    (row,) = ends(labels.judged(frame, load_config(overrides=overrides))).to_dict("records")
    assert (row["outcome_purchase"], row["outcome_contact"], row["outcome"]) == (0.0, 0.8, 0.4)


def test_broken_rows_do_not_stop_a_rule() -> None:
    frame = frame_of(talk("a", "deal", None), talk("b", "deal", None))
    frame.loc[0, ["conversation_id", "turn"]] = pd.NA
    table = ruled(frame.iloc[[1, 3, 0, 2]])
    assert (
        set(table.index) == set(frame.index)
        and ends(table[table["conversation_id"].eq("b").fillna(False)])["outcome"].sum() == 1.0
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"labels.rules": {"purchase": {**RULE, "pattern": "deal("}}},
            r"labels\.rules\.purchase\.pattern.*'deal\('.*missing \)",
        ),
        ({"labels.rules": {"purchase": {**RULE, "side": "staff"}}}, "'customer' or 'business'"),
        (
            {"labels.rules": {"purchase": {**RULE, "first_turn": 3, "last_turn": 2}}},
            "last_turn 2 is before first_turn 3",
        ),
        ({"labels.rules": {"purchase": {**RULE, "value": 7.0}}}, "7 is not from 0 to 1"),
        ({"labels.rules": {"purchse": RULE}}, r"no outcome is named 'purchse' \(did you mean 'purchase'"),
        ({"labels.rules": {"purchase": {**RULE, "value": 0.0}}}, "value is 0, which is what the outcome is without"),
        ({"labels.rules": {"purchase": {**RULE, "pattern": ""}}}, "is found in every message"),
        ({"labels.kind": "rule"}, "labels.rules names no rule"),
        ({"outcomes": {"origin": 1.0}}, "no outcome can be named 'origin'"),
        ({"labels.classifier.false_positive_cost": 0.0}, "false_positive_cost"),
    ],
)
def test_bad_settings_are_named(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides=overrides)


# --- by classifier ---------------------------------------------------------------------------------------------------


def classifier_config(**changes: Any) -> Any:
    return load_config().labels.classifier.model_copy(update={"reported_at_least": 50, **changes})


def fitted(*, seed: int = 0, noise: float = 0.0, **changes: Any) -> tuple[OutcomeClassifier, dict[str, float]]:
    frame = frame_of(*talks(240, 1.0, seed, noise))
    return fit_outcome_classifier(frame, OUTCOMES, classifier_config(**changes), 0)


def test_a_classifier_learns_what_was_reported_and_is_judged_on_conversations_it_has_not_seen() -> None:
    model, found = fitted()
    assert found["classifier_purchase_precision"] == found["classifier_purchase_recall"] == 1.0
    fresh = frame_of(*talks(60, 0.0, seed=5))
    said = model.labels(fresh)["outcome_purchase"]
    assert (said == transcripts(fresh).str.contains("|".join(GOOD))).all()


def test_held_out_figures_are_those_of_the_evidence_part() -> None:
    frame = frame_of(*talks(300, 1.0, noise=0.2))
    held = (frame["part"] == "evidence").to_numpy()
    model, found = fit_outcome_classifier(frame, OUTCOMES, classifier_config(), 0)
    won, said = ends(frame[held])["outcome"] > 0, model.labels(frame[held])["outcome_purchase"] > 0
    assert found["classifier_purchase_precision"] == pytest.approx(won[said].mean()) and found[
        "classifier_held_out"
    ] == len(won)
    assert found["classifier_purchase_recall"] == pytest.approx(said[won].mean())
    flipped = frame.assign(
        outcome_purchase=np.where(held & (frame["turn"] == 3), 1 - frame["outcome_purchase"], frame["outcome_purchase"])
    )
    again, worse = fit_outcome_classifier(flipped, OUTCOMES, classifier_config(), 0)
    assert np.array_equal(again.coefficients, model.coefficients) and np.array_equal(again.threshold, model.threshold)
    assert worse["classifier_purchase_recall"] < 0.5 < found["classifier_purchase_recall"]


@pytest.mark.parametrize(("positive", "negative", "wanted"), [(1.0, 1.0, 0.85), (1.0, 3.0, 0.3), (9.0, 1.0, 0.85)])
def test_the_threshold_costs_least(positive: float, negative: float, wanted: float) -> None:
    score, won = np.array([0.9, 0.8, 0.6, 0.5, 0.4, 0.2]), np.array([1, 0, 1, 0, 1, 0], bool)
    config = classifier_config(false_positive_cost=positive, false_negative_cost=negative)
    found = least_costly(won, score, config)
    costs = {
        t: positive * (~won & (score >= t)).sum() + negative * (won & (score < t)).sum() for t in np.linspace(0, 1, 201)
    }
    assert costs[min(costs, key=lambda t: abs(t - found))] == min(costs.values()) and found == pytest.approx(wanted)


def test_equal_scores_are_never_parted() -> None:
    assert least_costly(np.array([1, 0, 0], bool), np.array([0.5, 0.5, 0.5]), classifier_config()) > 0.5


def test_a_threshold_that_calls_nobody_positive_is_above_a_score_of_one() -> None:
    score = np.array([1.0, 1.0, 1.0, 0.0])
    assert (score < least_costly(np.array([1, 0, 0, 0], bool), score, classifier_config())).all()


def test_an_outcome_below_0_is_what_the_others_had() -> None:
    frame = frame_of(*talks(240, 1.0))
    signed = frame.assign(outcome_purchase=np.where(frame["turn"] == 3, 2 * frame["outcome_purchase"] - 1, 0.0))
    model, _ = fit_outcome_classifier(signed, OUTCOMES, classifier_config(), 0)
    fresh = frame_of(*talks(60, 0.0, seed=5))
    said = model.labels(fresh)["outcome_purchase"]
    assert set(said) == {-1.0, 1.0}
    assert ((said > 0) == transcripts(fresh).str.contains("|".join(GOOD))).all()


def test_conversations_of_signs_alone_are_refused() -> None:
    frame = frame_of(*talks(240, 1.0)).assign(customer_message="👍", business_message="!!")
    with pytest.raises(TrainingError, match=r"none of 1[0-9][0-9] reported conversations holds a word"):
        fit_outcome_classifier(frame, OUTCOMES, classifier_config(), 0)


def test_a_classifier_that_an_earlier_version_saved_says_0(tmp_path: Path) -> None:
    model, _ = fitted(noise=0.1)
    model.save(tmp_path)
    path = tmp_path / "outcome_classifier.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    arrays = load_file(tmp_path / "outcome_classifier.safetensors")
    del arrays["otherwise"]
    save_file(arrays, tmp_path / "outcome_classifier.safetensors")
    assert OutcomeClassifier.load(tmp_path).otherwise.tolist() == [0.0]


def test_costlier_false_positives_make_it_say_less() -> None:
    frame = frame_of(*talks(200, 0.0, seed=9, noise=0.3))
    cheap, dear = (fitted(noise=0.3, false_positive_cost=cost)[0].labels(frame).sum().item() for cost in (0.2, 5.0))
    assert dear < cheap


def test_saved_as_numbers_and_words_and_the_same_when_loaded(tmp_path: Path) -> None:
    model, _ = fitted(noise=0.1)
    model.save(tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".safetensors"}
    texts = transcripts(frame_of(*talks(20, 0.0, seed=7))).tolist()
    again = OutcomeClassifier.load(tmp_path)
    assert np.array_equal(again.probabilities(texts), model.probabilities(texts))
    assert again.probabilities([]).shape == (0, 1)
    (tmp_path / "outcome_classifier.safetensors").write_bytes(b"damaged")
    with pytest.raises(StoreError, match="not an outcome classifier"):
        OutcomeClassifier.load(tmp_path)


def changed(frame: pd.DataFrame, rows: np.ndarray, value: float) -> pd.DataFrame:
    return frame.assign(outcome_purchase=np.where(rows & (frame["turn"] == 3), value, frame["outcome_purchase"]))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (None, "of 240 reported conversations in all, 0 reached outcome 'purchase' and 240 did not"),
        ("fit", r"of \d+ reported conversations to be fitted on, 0 reached .* at least 5 customers of each"),
        ("evidence", r"of \d+ reported conversations held out, 0 reached .* raise data.evidence_share"),
    ],
)
def test_one_class_is_refused(part: str | None, message: str) -> None:
    frame = frame_of(*talks(240, 1.0))
    rows = np.ones(len(frame), bool) if part is None else (frame["part"] == part).to_numpy()
    with pytest.raises(TrainingError, match=message):
        fit_outcome_classifier(changed(frame, rows, 0.0), OUTCOMES, classifier_config(), 0)


@pytest.mark.parametrize(
    ("alike", "message"), [("won", r"did not, of 1 and \d\d+ customers; at least 5"), ("all", "of 2 and 2 customers")]
)
def test_too_few_customers_for_the_folds_are_refused_however_many_conversations_they_had(
    alike: str, message: str
) -> None:
    frame = frame_of(*talks(240, 1.0))
    won = frame.groupby("conversation_id")["outcome"].transform("max") > 0
    number = pd.factorize(frame["conversation_id"])[0]
    few = pd.Series([f"few-{k % 2}" for k in number], index=frame.index)
    one = frame["customer_id"].mask(won, "one")
    frame = frame.assign(customer_id=one if alike == "won" else few)
    with pytest.raises(TrainingError, match=message):
        fit_outcome_classifier(frame, OUTCOMES, classifier_config(), 0)


def test_too_few_reports_are_refused() -> None:
    frame = frame_of(*talks(49, 1.0))
    with pytest.raises(
        TrainingError, match=r"49 conversations have a reported outcome, fewer than .* = 50; report more"
    ):
        fit_outcome_classifier(frame, OUTCOMES, classifier_config(), 0)


# --- the stage -------------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, saved_models: Path) -> tuple[Path, Any]:
    return tmp_path / "data", copied(saved_models, tmp_path / "store")


def context_of(place: tuple[Path, Any], *said: Conversation, **settings: Any) -> RoundContext:
    """Round 0 after `said` has arrived."""
    given = {"data.root": str(place[0]), "labels.classifier.reported_at_least": 50, "data.evidence_share": 0.3}
    config: Config = load_config(overrides={**given, **{k.replace("__", "."): v for k, v in settings.items()}})
    write_once(round_folder(config, 0) / "arrived" / "t.parquet", frame_of(*said), config)
    return RoundContext(config, place[1], 0, place[1].round_run(0))


def test_a_classifier_is_registered_and_its_labels_name_its_version(place: tuple[Path, Any]) -> None:
    context = context_of(place, *talks(300, 0.6), labels__kind="classifier")
    before = (context.folder / "arrived" / "t.parquet").read_bytes()
    path = rounds.label_outcomes.fn(context)
    (version,) = model_versions.versions(place[1], registry.OUTCOME)
    table = labels.labelled(context.config, 0, path)
    told, found = ends(arrived(context.config, 0)), ends(table)  # type: ignore[arg-type]
    known = told[ORIGIN].eq("reported").fillna(False)
    assert set(found.loc[~known, ORIGIN]) == {f"classifier:{version.number}"} and (~known).sum() > 50
    pd.testing.assert_frame_equal(found[known], told[known])
    assert found.loc[~known, "outcome"].nunique() == 2 and float(version.tags["classifier_purchase_recall"]) == 1.0
    checked = validate(table, context.config)
    assert checked.bad.empty and labels.origin_metrics(checked.good)["outcomes_classifier"] == (~known).sum()

    assert rounds.label_outcomes.fn(context) == path and len(model_versions.versions(place[1], registry.OUTCOME)) == 1
    pd.testing.assert_frame_equal(labels.labelled(context.config, 0, path), table)
    assert (context.folder / "arrived" / "t.parquet").read_bytes() == before

    import mlflow.pyfunc

    served = mlflow.pyfunc.load_model(str(model_versions.fetch(place[1], registry.OUTCOME, version.number)))
    says = served.predict(pd.DataFrame({"transcript": [f"customer: {GOOD[0]}", f"customer: {BAD[0]}"]}))
    assert says[0][0] > 0.5 > says[1][0]


def test_dvc_repro_labels_as_a_night_does(place: tuple[Path, Any]) -> None:
    from flows.repro import folder, run_offline_stage

    said = talks(300, 0.6)
    context = context_of(place, *said, labels__kind="classifier")
    path = rounds.label_outcomes.fn(context)
    nightly = labels.labelled(context.config, 0, path)
    write(frame_of(*said), folder(context.config) / "collected" / "turns.parquet", OUTCOMES)
    (nights := context.config.data.root / "quarantine" / "round=0000").mkdir(parents=True)
    run_offline_stage(context.config, "validate")
    assert nights.exists()
    found = read(folder(context.config) / "validated" / "turns.parquet", OUTCOMES)
    assert ends(found)["outcome"].equals(ends(nightly)["outcome"])
    assert set(found[ORIGIN]) == {"reported", "classifier:0"}


def test_a_classifier_that_knows_nothing_is_doubted_when_it_is_fitted_and_in_the_report(
    place: tuple[Path, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its words say nothing of how they end; one that tells them apart gives no cause for doubt."""
    context = context_of(place, *talks(300, 0.6, noise=0.5), labels__kind="classifier")
    with caplog.at_level(logging.WARNING, "tasks.labels"):
        labelled = labels.labelled(context.config, 0, rounds.label_outcomes.fn(context))
    assert "the classifier of outcome 'purchase' is no better than calling all" in caplog.text
    write(labelled, context.config.data.root / "turns" / "round=0000" / "turns.parquet", OUTCOMES)
    figures = read_json(context.folder / "outcome_classifier" / "stage.json")["metrics"]
    assert figures["classifier_purchase_cost"] >= figures["classifier_purchase_cost_of_one_class"] > 0.3
    facts = round_row(RunRecord(), read_round(context.config.data.root, 0, {}, Path("state.json"), OUTCOMES))["facts"]
    said = f"AUC {figures['classifier_purchase_auc']:.3f}, recall {figures['classifier_purchase_recall']:.3f}"
    (told,) = (fact for fact in facts if said in fact)
    assert told.startswith("The classifier of “purchase” on ")
    assert any("no better than calling all" in fact for fact in facts)
    assert list(label_doubts(fitted()[1])) == []


def test_no_classifier_is_trained_where_all_is_reported(place: tuple[Path, Any]) -> None:
    context = context_of(place, *talks(20, 1.0), labels__kind="classifier")
    path = rounds.label_outcomes.fn(context)
    assert model_versions.versions(place[1], registry.OUTCOME) == []
    assert counts(labels.labelled(context.config, 0, path)) == {"reported": 20}


def test_conversations_that_will_be_quarantined_teach_nothing(place: tuple[Path, Any]) -> None:
    broken = [replace(one, turns=one.turns[1:-1]) for one in talks(100, 1.0, seed=3)]
    context = context_of(place, *talks(60, 0.5), *broken, labels__kind="classifier")
    with pytest.raises(TrainingError, match=r"^labels.kind classifier: (2|3)\d conversations have a reported outcome"):
        rounds.label_outcomes.fn(context)


def test_a_changed_rule_is_labelled_anew(place: tuple[Path, Any]) -> None:
    for pattern, wanted in (("lovely", 1.0), ("nothing like it", 0.0)):
        rules = {"purchase": {**RULE, "pattern": pattern}}
        context = context_of(place, talk("a", "how lovely", None), labels__kind="rule", labels__rules=rules)
        table = labels.labelled(context.config, 0, rounds.label_outcomes.fn(context))
        assert ends(table)["outcome"].tolist() == [wanted] and counts(table) == {"rule": 1}


# --- what judges a policy --------------------------------------------------------------------------------------------


def test_a_test_sees_reported_outcomes_and_rules_but_no_guesses() -> None:
    frame = frame_of(talk("a", "a deal", None), talk("b", "hi", "yes", origin="reported", won=1.0))
    guessing = load_config(overrides={"labels.kind": "classifier"})
    assert ends(labels.judged(frame, guessing))["outcome"].to_dict() == {"a": 0.0, "b": 1.0}
    assert ends(ruled(frame))["outcome"].to_dict() == {"a": 1.0, "b": 1.0}


def test_the_rule_may_not_change_while_a_test_runs() -> None:
    from tasks.state import Experiment

    rule = {"labels.kind": "rule", "labels.rules": {"purchase": RULE}}
    began = Experiment(salt="s", champion=1, challenger=2, settings=looks.settings_of(load_config(overrides=rule)))
    looks.unchanged(load_config(overrides=rule), began)
    other = {"labels.kind": "rule", "labels.rules": {"purchase": {**RULE, "pattern": "sold"}}}
    for config in (load_config(overrides=other), load_config()):
        with pytest.raises(ConfigError, match="labels: the A/B test 's' began with"):
            looks.unchanged(config, began)


def test_a_conversation_without_an_id_counts_as_quarantined(place: tuple[Path, Any], tmp_path: Path) -> None:
    context = context_of(place, *talks(60, 1.0), talk("nameless", "hello", None, origin="reported"))
    file = context.folder / "arrived" / "t.parquet"
    frame = pd.read_parquet(file)
    frame.assign(conversation_id=frame["conversation_id"].replace("nameless", None)).to_parquet(file)
    labelled = labels.labels_stage(context.config, 0, context.folder, None).path
    metrics = rounds._validated(context, {}, labelled, tmp_path)
    assert metrics == {"conversations": 60.0, "quarantined": 1.0}


def test_an_outcome_without_its_origin_is_quarantined(tmp_path: Path) -> None:
    frame = pd.concat([frame_of(talk(f"good{k}", "hi", None, origin="reported")) for k in range(30)])
    bad = frame_of(talk("bad", "hi", "yes", won=1.0), talk("odd", "hi", "yes", won=1.0, origin="guess"))
    config = load_config(overrides={"data.root": str(tmp_path)})
    checked = validate(pd.concat([frame, frame_of(talk("unknown", "hi", None)), bad], ignore_index=True), config)
    assert set(checked.bad["conversation_id"]) == {"bad", "odd"}
    reasons = checked.bad.drop_duplicates("conversation_id").set_index("conversation_id")["reason"]
    assert "outcome_origin: must not be null where there is an outcome" in reasons["bad"]
    assert "outcome_origin: must be reported, rule or classifier:<version> (found guess)" in reasons["odd"]


def test_labels_of_an_unknown_conversation_change_nothing() -> None:
    frame = as_reported(frame_of(talk("a", "hi", None)), OUTCOMES)
    found = pd.DataFrame({"outcome_purchase": [1.0]}, index=["b"])
    pd.testing.assert_frame_equal(with_labels(frame, found, "rule", OUTCOMES), frame)
    assert len(unreported(frame)) == 2 and by_rule(frame, {}).empty
