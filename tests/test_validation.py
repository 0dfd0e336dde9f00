"""Good conversations pass, each broken one leaves whole, alone, and says which row and field and why."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import TurnTableError, ValidationStopped
from iterative_ppo.mdp.conversation import ABSTAIN, MISSING, Conversation, Suggestion, Turn
from iterative_ppo.mdp.turn_table import read as read_table
from iterative_ppo.mdp.turn_table import to_frame
from iterative_ppo.mdp.turn_table import write as write_table
from tasks.turn_checks import checks, grouped
from tasks.validation import Validation, quarantine, turn_suite, validate, validate_round

MORNING = datetime(2025, 3, 1, 9, tzinfo=UTC)
SAID = Suggestion("Would Tuesday suit you?", "suggested", -4.5)


def at(minute: int) -> datetime:
    return MORNING + timedelta(minutes=minute)


def buys(name: str, **changes: Any) -> Conversation:
    """Four rows: suggested, abstained, missing, then the terminal one with an outcome."""
    turns = (
        Turn("Hello", (0.0, 0.0), SAID, "Does Tuesday suit you?", "edited", at(0)),
        Turn("", (0.0, 0.0), ABSTAIN, "Let me look.", "rejected", at(1)),
        Turn("And the price?", (0.0, 0.0), MISSING, "400", None, at(1)),
        Turn("Done", (1.0, 0.5), timestamp=at(9)),
    )
    return Conversation(name, turns, f"customer of {name}", "b1", "kitchen", "v1", "champion", **changes)


def leaves(name: str) -> Conversation:
    """Three rows: sent verbatim, not answered, then the terminal one without a message."""
    turns = (
        Turn("Hello", (0.0, 0.0), SAID, SAID.text, "verbatim", at(0)),
        Turn("Hello?", (0.0, 0.0), Suggestion("Yes", "suggested", 0.0), None, "no_reply", None),
        Turn(None, (0.0, 0.0), timestamp=at(70)),
    )
    return Conversation(name, turns, f"customer of {name}", None, None, "v2")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    outcomes = {"purchase": 1.0, "rating": -0.5}
    root = str(tmp_path_factory.mktemp("validation") / "data")
    return load_config(overrides={"outcomes": outcomes, "data.root": root, "data.quarantine_share": 0.9})


def table(config: Config, *talks: Conversation) -> pd.DataFrame:
    return to_frame(talks, config.outcomes, config.data.evidence_share)


@dataclass(frozen=True)
class Break:
    """One way to break a conversation: `change` its rows, and `field` is blamed at row `place` of the result."""

    name: str
    field: str
    place: int
    change: Callable[[pd.DataFrame], pd.DataFrame]
    talk: Callable[[str], Conversation] = buys
    says: str = ""


def setting(column: str, place: int, value: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    def change(rows: pd.DataFrame) -> pd.DataFrame:
        rows.loc[place, column] = value
        return rows

    return change


def set_at(name: str, place: int, value: Any, says: str, talk: Callable[[str], Conversation] = buys) -> Break:
    return Break(f"{name} {place} {value}", name, place, setting(name, place, value), talk, says)


def outcome_early(rows: pd.DataFrame) -> pd.DataFrame:
    rows.loc[1, ["outcome", "outcome_purchase"]] = 1.0
    return rows


def terminal_early(rows: pd.DataFrame) -> pd.DataFrame:
    rows.loc[1, ["suggestion", "suggestion_status", "business_message", "adoption"]] = None
    return rows


def silent_early(rows: pd.DataFrame) -> pd.DataFrame:
    rows.loc[0, "business_message"] = None
    rows.loc[0, "adoption"] = "no_reply"
    return rows


def other_weight(rows: pd.DataFrame) -> pd.DataFrame:
    rows.loc[3, "outcome"] = 0.8
    return rows


BREAKS = [
    *[set_at(c, 1, None, "not be null") for c in ("turn", "customer_id", "outcome", "outcome_rating", "part")],
    set_at("customer_id", 0, "", "not be empty"),
    set_at("suggestion_status", 0, "proposed", "be one of suggested, abstained, missing (found proposed)"),
    set_at("adoption", 0, "liked", "be one of verbatim, edited, rejected, no_reply (found liked)"),
    set_at("part", 2, "test", "be one of fit, evidence"),
    Break("a turn twice", "turn", 1, setting("turn", 2, 2), says="occur once"),
    set_at("turn", 3, 5, "count 1, 2, 3"),
    Break("no first turn", "turn", 0, lambda rows: rows.drop(index=0), says="count 1, 2, 3"),
    Break("a gap", "turn", 1, lambda rows: rows.drop(index=1), says="count 1, 2, 3"),
    Break("out of order", "turn", 1, lambda rows: rows.loc[[0, 2, 1, 3]], says="count 1, 2, 3"),
    Break("a row twice", "turn", 1, lambda rows: rows.loc[[0, 1, 1, 2, 3]], says="occur once"),
    Break("open", "suggestion_status", 2, lambda rows: rows.drop(index=3), says="null (terminal) in the last row"),
    Break("two terminal", "suggestion_status", 1, terminal_early, says="not be null (terminal) before the last"),
    set_at("timestamp", 2, at(0), "not go back"),
    set_at("timestamp", 2, at(-1), "not go back", leaves),
    set_at("customer_message", 1, None, "not be null before"),
    Break("no outcome", "customer_message", 2, setting("customer_message", 2, "Hm"), leaves, "be null in a terminal"),
    set_at("business_message", 1, None, "not be null unless adoption is no_reply"),
    set_at("business_message", 0, None, "not be null unless adoption is no_reply", leaves),
    set_at("business_message", 3, "Thanks", "be null in a terminal row"),
    set_at("adoption", 0, "no_reply", "not be no_reply where a business_message was sent"),
    Break("silence, then more", "adoption", 0, silent_early, says="only before a terminal row without a message"),
    set_at("adoption", 3, "verbatim", "be null in a terminal row"),
    set_at("suggestion", 0, None, "hold text"),
    set_at("suggestion", 0, "", "hold text"),
    set_at("suggestion", 1, "No", 'be "" where suggestion_status is abstained'),
    set_at("suggestion", 1, None, 'be "" where suggestion_status is abstained'),
    set_at("suggestion", 2, "Maybe", "be null where suggestion_status is missing"),
    set_at("suggestion", 3, "Maybe", "be null in a terminal row"),
    set_at("behaviour_logprob", 0, 0.1, "be finite and at most 0 (found 0.1)"),
    set_at("behaviour_logprob", 0, -np.inf, "be finite and at most 0"),
    set_at("behaviour_logprob", 2, -1.0, "be null where suggestion_status is missing"),
    set_at("behaviour_logprob", 3, -1.0, "be null in a terminal row"),
    set_at("outcome", 3, 1.5, "be the weighted sum of the named outcomes (found 1.5)"),
    set_at("outcome", 3, np.inf, "be the weighted sum of the named outcomes"),
    set_at("outcome_purchase", 3, -1.0, "be from 0 to 1 (found -1.0)"),
    set_at("outcome_purchase", 3, np.inf, "be from 0 to 1"),
    Break("weights", "outcome", 3, other_weight, says="be the weighted sum of the named outcomes"),
    Break("outcome early", "outcome", 1, outcome_early, says="be 0 before the terminal row"),
    Break("named early", "outcome_purchase", 1, outcome_early, says="be 0 before the terminal row"),
    set_at("customer_id", 2, "somebody else", "be the same in all rows"),
    set_at("business_id", 1, "b2", "be the same in all rows"),
    set_at("policy_version", 1, "v2", "be the same in all rows"),
    set_at("policy_version", 1, None, "be the same in all rows"),
    set_at("arm", 1, "challenger", "be the same in all rows"),
]


def other_part(rows: pd.DataFrame) -> pd.DataFrame:
    rows.loc[1, "part"] = "evidence" if rows.loc[1, "part"] == "fit" else "fit"
    return rows


BREAKS.append(Break("another part", "part", 1, other_part, says="be the same in all rows"))
NAMES = [f"{number} {one.name}" for number, one in enumerate(BREAKS)]


@dataclass(frozen=True)
class Verdict:
    frame: pd.DataFrame
    validation: Validation


@pytest.fixture(scope="module")
def verdict(config: Config) -> Verdict:
    """All broken conversations in one table between good ones, validated once."""
    frames = []
    for number, (name, one) in enumerate(zip(NAMES, BREAKS, strict=True)):
        frames.append(one.change(table(config, one.talk(name))))
        frames.append(table(config, (buys if number % 2 else leaves)(f"good {number}")))
    returning = table(config, buys("returning"))
    frame = pd.concat([returning.iloc[:2], *frames, returning.iloc[2:]], ignore_index=True)
    return Verdict(frame, validate(frame, config))


def test_outcomes_that_come_together_may_be_worth_more_than_each(config: Config) -> None:
    both = config.model_copy(update={"outcomes": {"purchase": 1.0, "rating": 0.5}})
    talk = buys("both")
    last = replace(talk.turns[-1], outcomes=(1.0, 1.0))
    checked = validate(table(both, replace(talk, turns=(*talk.turns[:-1], last))), both)
    assert checked.good["outcome"].max() == 1.5 and checked.bad.empty


def test_the_best_and_the_worst_conversations_are_kept_however_their_sum_rounds(config: Config) -> None:
    """Of four products added up in another order, the sum may end a digit lower: the worst's did, on one processor."""
    weights = {"purchase": 0.85, "contact": 0.15, "rating": 1.99, "visit": 1.94}
    data = config.data.model_copy(update={"outcome_low": -0.7, "outcome_high": 99.9})
    priced = config.model_copy(update={"outcomes": weights, "data": data})
    talks = [
        replace(leaves(name), turns=(Turn("Hi", (0.0,) * 4, SAID, "Hm"), Turn("Done", (end,) * 4)))
        for name, end in (("best", 99.9), ("worst", -0.7))
    ]
    checked = validate(table(priced, *talks), priced)
    assert checked.bad.empty, checked.reasons


def test_each_outcome_is_held_to_its_own_range(config: Config) -> None:
    data = config.data.model_copy(update={"outcome_ranges": {"revenue": (0.0, 500.0)}})
    both = config.model_copy(update={"outcomes": {"revenue": 1.0, "contact": 5.0}, "data": data})

    def ends(name: str, *outcomes: float) -> Conversation:
        talk = leaves(name)
        return replace(talk, turns=(Turn("Hi", (0.0, 0.0), SAID, "Hm"), Turn("Done", outcomes)))

    checked = validate(
        table(both, ends("order", 480.0, 1.0), ends("contact", 0.0, 2.0), ends("more", 501.0, 0.0)), both
    )
    assert set(checked.good["conversation_id"]) == {"order"}
    reasons = checked.bad.groupby("conversation_id")["reason"].first()
    assert "contact: must be from 0 to 1" in reasons["contact"] and "revenue: must be from 0 to 500" in reasons["more"]


@pytest.mark.parametrize("number", range(len(BREAKS)), ids=NAMES)
def test_a_broken_conversation_says_row_field_and_reason(verdict: Verdict, number: int) -> None:
    one, frame, bad = BREAKS[number], verdict.frame, verdict.validation.bad
    rows = np.flatnonzero(frame["conversation_id"] == NAMES[number])
    reasons = bad.loc[bad["conversation_id"] == NAMES[number], "reason"]
    assert len(reasons) == len(rows) and reasons.nunique() == 1
    found = [words for words in reasons.iloc[0].split("; ") if f", {one.field}: must" in words]
    assert any(words.startswith(f"row {rows[one.place]}, turn ") and one.says in words for words in found), (
        reasons.iloc[0]
    )


def test_exactly_the_broken_conversations_leave(verdict: Verdict) -> None:
    good, bad = verdict.validation.good, verdict.validation.bad
    assert set(bad["conversation_id"]) == {*NAMES, "returning"}
    assert set(good["conversation_id"]) == {f"good {number}" for number in range(len(BREAKS))}
    assert len(good) + len(bad) == len(verdict.frame)
    assert good["turn"].dtype == np.int32
    assert verdict.validation.statistics["quarantined_conversations"] == len(BREAKS) + 1


def test_rows_that_return_after_another_conversation_are_bad(verdict: Verdict) -> None:
    bad = verdict.validation.bad
    reason = bad.loc[bad["conversation_id"] == "returning", "reason"].iloc[0]
    assert f"row {len(verdict.frame) - 2}, turn 3, conversation_id: must not return" in reason


def test_reasons_are_counted_by_conversation(verdict: Verdict) -> None:
    reasons = verdict.validation.reasons
    assert reasons["turn: must not be null"] == 1
    assert reasons["policy_version: must be the same in all rows of a conversation"] == 2
    assert list(reasons.values()) == sorted(reasons.values(), reverse=True)


def test_good_rows_make_a_turn_table_and_bad_ones_a_quarantine(
    verdict: Verdict, config: Config, tmp_path: Path
) -> None:
    write_table(verdict.validation.good, tmp_path / "good.parquet", config.outcomes)
    assert len(read_table(tmp_path / "good.parquet", config.outcomes)) == len(verdict.validation.good)
    folder = config.data.root / "quarantine" / "round=0000"
    assert {file.name for file in folder.iterdir()} == {"turns.parquet", "turns.csv"}
    for read in (pd.read_parquet(folder / "turns.parquet"), pd.read_csv(folder / "turns.csv")):
        assert read["reason"].tolist() == verdict.validation.bad["reason"].tolist()


def test_rows_without_a_conversation_leave_with_those_they_are_missing_from(config: Config) -> None:
    frame = table(config, buys("whole"), buys("torn"))
    frame.loc[5, "conversation_id"] = None
    bad = validate(frame, config).bad
    assert bad["conversation_id"].fillna("none").tolist() == ["torn", "none", "torn", "torn"]
    assert "row 5, turn 2, conversation_id: must not be null" in bad["reason"][1]
    assert "row 6, turn 3, turn: must count 1, 2, 3" in bad["reason"][0]


def test_the_quarantine_of_a_round_goes_where_it_is_validated_anew_without_bad_rows(
    config: Config, tmp_path: Path
) -> None:
    here, frame = moved(config, tmp_path), table(config, buys("a"), leaves("b"))
    folder = tmp_path / "quarantine" / "round=0007"
    assert len(validate(frame.assign(adoption=frame["adoption"].where(frame.index > 0, "liked")), here, {}, 7).bad)
    assert folder.exists()
    assert validate(frame, here, {}, 7).bad.empty
    assert not folder.exists()


def test_data_docs_list_all_rounds_and_show_no_message(config: Config, tmp_path: Path) -> None:
    here = moved(config, tmp_path)
    for number in (3, 4):
        validate(table(here, buys("c1"), leaves("c2")), here, round_number=number)
    index = (tmp_path / "data_docs" / "index.html").read_text()
    assert "round=0003" in index and "round=0004" in index
    pages = [page.read_text() for page in (tmp_path / "data_docs" / "validations").rglob("*.html")]
    assert len(pages) == 2
    assert all("must count 1, 2, 3" in page and "Tuesday" not in page for page in pages)


def moved(config: Config, root: Path, **data: Any) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update={"root": root, **data})})


def test_the_round_stops_only_after_the_quarantine_is_written(config: Config, tmp_path: Path) -> None:
    here = moved(config, tmp_path, quarantine_share=0.4)
    frame = table(here, buys("a"), leaves("b"))
    frame.loc[0, "adoption"] = "liked"
    with pytest.raises(
        ValidationStopped, match=r"1 of 2 conversations \(50.0%.*allows 40.0%\).*adoption.*quarantine"
    ) as stop:
        validate(frame, here, round_number=7)
    assert "\n" not in str(stop.value)
    assert len(pd.read_parquet(tmp_path / "quarantine" / "round=0007" / "turns.parquet")) == 4
    assert len(validate(frame, moved(here, tmp_path, quarantine_share=0.5)).bad) == 4


def test_the_round_stops_where_nothing_good_or_nothing_at_all_is_left(config: Config) -> None:
    frame = table(config, buys("a"))
    with pytest.raises(ValidationStopped, match="no rows to validate"):
        validate(frame.iloc[:0], config)
    frame["part"] = "none"
    with pytest.raises(ValidationStopped, match="1 of 1"):
        validate(frame, moved(config, config.data.root, quarantine_share=1.0))


def test_a_missing_column_is_named(config: Config) -> None:
    with pytest.raises(TurnTableError, match="'adoption'"):
        validate(table(config, buys("a")).drop(columns="adoption"), config)


def test_a_moved_outcome_rate_of_the_same_policy_version_is_a_warning(config: Config) -> None:
    frame = table(config, *[buys(f"a{i}") for i in range(8)], *[leaves(f"b{i}") for i in range(8)])
    frame.loc[frame["conversation_id"].isin(["a0", "a1"]), "policy_version"] = "v2"
    done = validate(frame, config, {"v1": 0.95, "v2": 0.5, "v9": 0.0})
    assert done.statistics["outcome_rates"] == {"v1": 1.0, "v2": 0.2}
    assert len(done.warnings) == 1
    assert "v2" in done.warnings[0] and "0.200 over 10 conversations, was 0.500" in done.warnings[0]
    assert done.bad.empty and not done.reasons


def test_successes_whose_failures_are_not_here_yet_are_a_warning(config: Config) -> None:
    def ended(name: str, sold: bool, hours: int) -> Conversation:
        talk = buys(name) if sold else leaves(name)
        return replace(talk, turns=(*talk.turns[:-1], replace(talk.turns[-1], timestamp=at(60 * hours + 120))))

    old = [ended(f"old {k}", k == 0, k) for k in range(4)]
    new = [ended(f"new {k}", True, 100 + k) for k in range(4)]
    (told,) = validate(table(config, *old, *new), config).warnings
    assert told.startswith("outcome rate 0.625 over 8 conversations, 0.250 without the 4 whose last turn is of the new")
    whole = [ended(f"new {k}", k == 0, 100 + k) for k in range(4)]
    assert not validate(table(config, *old, *whole), config).warnings
    assert not validate(table(config, *new), config).warnings, "nothing to hold them against"


def test_a_customer_in_both_parts_is_a_warning(config: Config) -> None:
    frame = table(config, buys("a"), buys("b"))
    frame["customer_id"] = "the same"
    frame["part"] = ["fit"] * 4 + ["evidence"] * 4
    assert "1 customer_id" in validate(frame, config).warnings[0]


def test_the_suite_goes_through_json(config: Config) -> None:
    from great_expectations import ExpectationSuite

    suite = turn_suite(config)
    again = ExpectationSuite(**suite.to_json_dict())
    assert len(again.expectations) == len(suite.expectations) > 40
    assert all(one.meta["field"] and one.meta["must"] for one in again.expectations)


def test_quarantine_takes_mixed_types_and_replaces_what_was_there(tmp_path: Path) -> None:
    quarantine(pd.DataFrame({"turn": [1, "two", None], "reason": "odd"}), tmp_path / "q")
    read = pd.read_parquet(tmp_path / "q" / "turns.parquet")
    assert read["turn"].fillna("null").tolist() == ["1", "two", "null"]
    quarantine(pd.DataFrame({"turn": [3], "reason": ["odd"]}), tmp_path / "q")
    assert pd.read_csv(tmp_path / "q" / "turns.csv")["turn"].tolist() == [3]
    assert [file.name for file in tmp_path.iterdir()] == ["q"]


def test_the_task_is_the_function() -> None:
    assert validate_round.fn is validate


def test_importing_the_task_does_not_import_great_expectations() -> None:
    code = "import sys, tasks.validation; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


words = st.sampled_from(["", "Hello", "Hé?\n", "0"])


@st.composite
def conversations(draw: st.DrawFn, name: str = "c") -> Conversation:
    turns = []
    for minute in range(draw(st.integers(0, 4))):
        action = draw(st.sampled_from([ABSTAIN, MISSING, SAID]))
        stamp = draw(st.sampled_from([None, at(minute)]))
        adoption = draw(st.sampled_from([None, "verbatim", "edited", "rejected"]))
        turns.append(Turn(draw(words), (0.0, 0.0), action, draw(words), adoption, stamp))
    paid = draw(st.booleans())
    if turns and not paid and draw(st.booleans()):
        turns[-1] = replace(turns[-1], business_message=None, adoption="no_reply")
    end = Turn(draw(words), (1.0, 0.0)) if paid else Turn(None, (0.0, 0.0))
    return Conversation(name, (*turns, end), draw(st.sampled_from(["x", "y"])))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talks=st.lists(conversations(), max_size=4))
def test_whatever_the_conversations_are_well_formed_ones_pass_all_checks(
    config: Config, talks: list[Conversation]
) -> None:
    named = [replace(talk, conversation_id=f"c{number}") for number, talk in enumerate(talks)]
    frame = table(config, *named)
    failed = [name for name, holds in checks(grouped(frame), config.outcomes).items() if not holds.all()]
    assert not failed
