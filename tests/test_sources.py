"""Importers: hand-made logs for every rule and every kind of bad input, and the figures of the public logs."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.offline import _taken_up
from iterative_ppo.config import Config, load_config
from iterative_ppo.errors import ConfigError, SourceError, TrainingError
from iterative_ppo.mdp.conversation import Conversation, Turn
from iterative_ppo.mdp.turn_table import conversations, read, to_frame, write
from iterative_ppo.sources import SOURCES, ImportedLog, SetAside, import_log, importer
from iterative_ppo.sources.craigslist import import_craigslist
from iterative_ppo.sources.log import read_json
from iterative_ppo.sources.star import import_star
from iterative_ppo.sources.table import import_table
from tasks.datasets import of_policy
from tasks.inbox import take_up
from tasks.traffic import import_logs, read_logs

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
CONFIG = load_config()
ONE = {"purchase": 1.0}


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path}: the public logs are not here")
    return path


def only(log: ImportedLog) -> Conversation:
    assert not log.set_aside
    assert len(log.conversations) == 1
    return log.conversations[0]


def the_bad(log: ImportedLog, good: int = 1) -> SetAside:
    assert len(log.conversations) == good
    assert len(log.set_aside) == 1
    return log.set_aside[0]


def actions(log: ImportedLog) -> list[Turn]:
    return [turn for talk in log.conversations for turn in talk.turns if not turn.terminal]


def check_invariants(log: ImportedLog) -> None:
    for talk in log.conversations:
        *before, last = talk.turns
        assert before
        assert last.terminal
        assert (last.business_message, last.adoption) == (None, None)
        assert any(last.outcomes) or last.customer_message is None
        for turn in before:
            assert turn.suggestion is not None
            assert turn.customer_message is not None
            assert not any(turn.outcomes)


# --- STAR ---------------------------------------------------------------------------------------------------------

RESPONSES = {
    "hello": "Hi!",
    "pick": "Table {table_name:s} at {time:d} o'clock, id {booking_id:d}.",
    "done": "Booked at {place:s}.",
}


def user(text: str, time: int = 1) -> dict[str, Any]:
    return {"Agent": "User", "Action": "utter", "Text": text, "UnixTime": time}


def asked(draft: str = "a draft") -> dict[str, Any]:
    return {"Agent": "Wizard", "Action": "request_suggestions", "Text": draft, "UnixTime": 1}


def picks(label: str, *options: str, text: str, item: dict[str, Any] | None = None) -> dict[str, Any]:
    event = {"Agent": "Wizard", "Action": "pick_suggestion", "ActionLabel": label, "Text": text, "UnixTime": 1}
    return {**event, "ActionLabelOptions": list(options), **({"PrimaryItem": item} if item else {})}


def types(text: str) -> dict[str, Any]:
    return {"Agent": "Wizard", "Action": "utter", "Text": text}


def returns(message: str, key: str = "Message", api: str = "table_book") -> dict[str, Any]:
    return {"Agent": "KnowledgeBase", "Action": "return_item", "APIName": api, "Item": {key: message}}


GUIDE = {"Agent": "UserGuide", "Action": "instruct", "Text": "LEAK", "UnixTime": 1}
HELLO = [user("hi"), asked(), picks("hello", "hello", "pick", text="Hi!")]


def dialogue(events: list[Any], name: int = 1, **changes: Any) -> dict[str, Any]:
    scenario = {"WizardCapabilities": [{"Task": "table_book"}], "UserTask": "LEAK"}
    ids = {"DialogueID": name, "AnonymizedUserWorkerID": "u1", "AnonymizedWizardWorkerID": "w1"}
    return {**ids, "Events": events, "Scenario": scenario, "CompletionLevel": "LEAK", **changes}


@pytest.fixture
def star(tmp_path: Path) -> Callable[..., ImportedLog]:
    def run(*dialogues: Any) -> ImportedLog:
        task = tmp_path / "tasks" / "table_book"
        task.mkdir(parents=True)
        (task / "responses.json").write_text(json.dumps(RESPONSES))
        (tmp_path / "dialogues").mkdir()
        for number, one in enumerate(dialogues):
            content = one if isinstance(one, bytes) else json.dumps(one).encode()
            (tmp_path / "dialogues" / f"{number}.json").write_bytes(content)
        log = import_star(tmp_path)
        check_invariants(log)
        return log

    return run


def test_star_ends_with_the_users_message_before_the_first_success(star: Callable[..., ImportedLog]) -> None:
    after = [returns("Ride booked."), types("Done!"), user("bye", 5), types("bye")]
    talk = only(star(dialogue([GUIDE, *HELLO, user("a table", 3), returns("Reservation Confirmed"), *after])))
    assert [(turn.customer_message, turn.outcomes) for turn in talk.turns] == [("hi", (0.0,)), ("a table", (1.0,))]
    assert (talk.conversation_id, talk.customer_id, talk.business_id) == ("1", "u1", "w1")
    assert (talk.context, talk.extra) == ("table book", {"dropped_turns": "1"})
    assert talk.turns[-1].timestamp == datetime(1970, 1, 1, 0, 0, 3, tzinfo=UTC)
    assert "LEAK" not in repr(talk)
    assert "a draft" not in repr(talk)


@pytest.mark.parametrize(
    ("event", "won"),
    [
        (returns("Reservation Confirmed", "ReservationStatus"), True),
        (returns("Your event has been successfully scheduled."), True),
        (returns("It was successfuly scheduled. Bring a passport."), True),
        (returns("It was succesfuly scheduled."), True),
        (returns("Reservation Failed"), False),
        (returns("Reservation Confirmed", api="another_api"), False),
        (returns("Reservation Confirmed", "Note"), False),
        ({**returns(""), "Item": None}, False),
        (types("Reservation Confirmed"), False),
    ],
)
def test_star_success_is_the_tasks_own_confirmation(
    star: Callable[..., ImportedLog], event: dict[str, Any], won: bool
) -> None:
    assert only(star(dialogue([*HELLO, user("book it"), event]))).turns[-1].outcomes == (float(won),)


def test_star_without_success_ends_with_nobodys_message(star: Callable[..., ImportedLog]) -> None:
    talk = only(star(dialogue([*HELLO, user("hello?", 7)])))
    assert [turn.customer_message for turn in talk.turns] == ["hi", None]
    assert talk.turns[-1].outcomes == (0.0,)


def test_star_tells_the_four_statuses_apart(star: Callable[..., ImportedLog]) -> None:
    item = {"APIName": "table_book", "TableName": "Oak", "Time": "9 pm", "id": 7}
    other = picks("hello", "pick", "hello", text="Hi!", item=item)
    own, custom = [asked(), types("Well")], picks("custom", "custom", text="Hm")
    log = star(dialogue([*HELLO, user("b"), other, user("c"), *own, user("d"), custom]))
    got = [(t.suggestion.text, t.suggestion.status, t.adoption) for t in only(log).turns[:-1] if t.suggestion]
    assert got == [
        ("Hi!", "suggested", "verbatim"),
        ("Table Oak at 9 pm, id 7.", "suggested", "rejected"),
        (None, "missing", "rejected"),
        (None, "missing", None),
    ]
    assert [turn.business_message for turn in only(log).turns[:-1]] == ["Hi!", "Hi!", "Well", "Hm"]


def test_star_renders_what_it_can(star: Callable[..., ImportedLog]) -> None:
    def over(option: str) -> list[Any]:
        return [user("x"), picks("hello", option, "hello", text="Hi!")]

    seen = [user("x"), picks("bye", "bye", text="Goodbye.")]
    log = star(dialogue([*over("done"), *over("bye"), *over("never_seen"), *seen]))
    got = [(turn.suggestion.text, turn.suggestion.status) for turn in actions(log) if turn.suggestion]
    assert got[0] == ("Booked at .", "suggested")  # a slot without a value
    assert got[1] == ("Goodbye.", "suggested")  # no template, but it was picked elsewhere
    assert got[2] == (None, "missing")


def test_star_joins_consecutive_messages_and_allows_the_wizard_to_open(star: Callable[..., ImportedLog]) -> None:
    talk = only(star(dialogue([types("Welcome"), user("a"), user("b"), types("c"), types("d")])))
    assert [turn.customer_message for turn in talk.turns] == ["", "a\nb", None]
    assert [turn.business_message for turn in talk.turns] == ["Welcome", "c\nd", None]


def test_star_takes_a_suggestion_with_more_words_for_edited(star: Callable[..., ImportedLog]) -> None:
    turn = only(star(dialogue([*HELLO, types("How are you?"), user("b")]))).turns[0]
    assert turn.suggestion is not None
    assert (turn.suggestion.text, turn.business_message, turn.adoption) == ("Hi!", "Hi!\nHow are you?", "edited")


def changed(event: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**event, **changes}.items() if value != "absent"}


@pytest.mark.parametrize(
    ("bad", "field", "row", "words"),
    [
        (dialogue([*HELLO, changed(user("x"), Agent=None)], 2), "Agent", 4, "found None"),
        (dialogue([*HELLO, changed(user("x"), Agent="Bot")], 2), "Agent", 4, "'Bot'"),
        (dialogue([*HELLO, changed(user("x"), Action="sing")], 2), "Action", 4, "'sing'"),
        (dialogue([*HELLO, changed(user("x"), Text="absent")], 2), "Text", 4, "missing"),
        (dialogue([*HELLO, user("half \ud800")], 2), "Text", 4, "half a character"),
        (dialogue([*HELLO, "x"], 2), "Agent", 4, "missing"),
        (dialogue([user("x", 9), *HELLO], 2), "UnixTime", 2, "earlier"),
        (dialogue([*HELLO, user("x", "noon")], 2), "UnixTime", 4, "'noon'"),  # type: ignore[arg-type]
        (dialogue([*HELLO, picks("a", text="x")], 2), "ActionLabelOptions", 4, "options"),
        (dialogue([GUIDE], 2), "Events", None, "no user turn"),
        (dialogue([user("x")], 2), None, None, "no transition"),
        (dialogue([user("x"), returns("Ride booked")], 2), None, None, "no transition"),
        (dialogue("x", 2), "Events", None, "expected list"),  # type: ignore[arg-type]
        (dialogue(HELLO, 2, AnonymizedUserWorkerID=None), "AnonymizedUserWorkerID", None, "expected str"),
        (dialogue(HELLO, 2, Scenario={}), "Scenario.WizardCapabilities", None, "missing"),
        (dialogue(HELLO, 2, Scenario={"WizardCapabilities": []}), "Scenario.WizardCapabilities", None, "one task"),
        (dialogue(HELLO, 1), "DialogueID", None, "duplicate"),
        (changed(dialogue(HELLO), DialogueID="absent"), "DialogueID", None, "missing"),
        ([], "DialogueID", None, "missing"),
    ],
)
def test_star_sets_a_bad_dialogue_aside(
    star: Callable[..., ImportedLog], bad: Any, field: str | None, row: int | None, words: str
) -> None:
    aside = the_bad(star(dialogue(HELLO), bad))
    assert (aside.field, aside.row) == (field, row)
    for part in (str(aside.file), words, field or "", "" if row is None else f"row {row}"):
        assert part in aside.reason


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"DialogueID": 2, "Eve', "truncated"),
        (b'{"Text": "caf\xe9"}', "UTF-8"),
        (b" \n", "empty"),
        (b"{]", "column 2"),
    ],
)
def test_star_sets_an_unreadable_file_aside(star: Callable[..., ImportedLog], content: bytes, words: str) -> None:
    aside = the_bad(star(dialogue(HELLO), content))
    assert aside.conversation_id == "1"
    assert words in aside.reason
    assert aside.file.name == "1.json"


def test_star_needs_its_folders(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="dialogues/ and tasks/"):
        import_star(tmp_path)
    task = tmp_path / "tasks" / "table_book"
    task.mkdir(parents=True)
    with pytest.raises(SourceError, match=r"dialogues.*expected a folder"):
        import_star(tmp_path)
    (tmp_path / "dialogues").mkdir()
    with pytest.raises(SourceError, match=r"end in \.json"):
        import_star(tmp_path)
    (task / "responses.json").write_text("[]")
    with pytest.raises(SourceError, match="mapping of option names"):
        import_star(tmp_path)


# --- CraigslistBargain ------------------------------------------------------------------------------------------

BUYER, SELLER = 0, 1


def event(agent: Any, action: str = "message", data: Any = None, time: Any = None) -> dict[str, Any]:
    return {"agent": agent, "action": action, "data": data, "time": time, "start_time": None}


def says(agent: int, text: str, time: Any = None) -> dict[str, Any]:
    return event(agent, data=text, time=time)


def side(role: str, target: int) -> dict[str, Any]:
    item = {"Title": "Bike", "Category": "bike", "Price": 100}
    return {"personal": {"Role": role, "Target": target, "Bottomline": None}, "item": item}


def haggle(events: list[Any], reward: Any = 0, name: str = "C_1", **changes: Any) -> dict[str, Any]:
    scenario = {"post_id": "p1", "kbs": [side("buyer", 77), side("seller", 90)]}
    return {
        "uuid": name,
        "scenario": scenario,
        "outcome": {"reward": reward, "offer": None},
        "events": events,
        **changes,
    }


TALK = [says(BUYER, "hi", "1.5"), says(SELLER, "hey", "2.5")]


@pytest.fixture
def craigslist(tmp_path: Path) -> Callable[..., ImportedLog]:
    def run(*dialogues: Any) -> ImportedLog:
        (tmp_path / "dev.json").write_text(json.dumps(dialogues))
        log = import_craigslist(tmp_path)
        check_invariants(log)
        return log

    return run


def messages(talk: Conversation) -> list[tuple[str | None, str | None]]:
    return [(turn.customer_message, turn.business_message) for turn in talk.turns]


def test_craigslist_suggests_what_was_sent(craigslist: Callable[..., ImportedLog]) -> None:
    more = [says(BUYER, "70?"), event(BUYER, "offer", {"price": 70.0}), event(SELLER, "offer", {"price": None})]
    talk = only(craigslist(haggle([*TALK, *more])))
    assert messages(talk) == [("hi", "hey"), ("70?\n<offer $70.0>", "<offer>"), (None, None)]
    for turn in talk.turns[:-1]:
        assert turn.suggestion is not None
        assert (turn.suggestion.text, turn.suggestion.status) == (turn.business_message, "suggested")
        assert turn.adoption == "verbatim"
    assert (talk.customer_id, talk.business_id) == ("p1", None)
    assert talk.turns[0].timestamp == datetime(1970, 1, 1, 0, 0, 1, 500000, tzinfo=UTC)


def test_craigslist_shows_the_seller_its_own_target_only(craigslist: Callable[..., ImportedLog]) -> None:
    talk = only(craigslist(haggle(TALK)))
    assert talk.context == "Bike (category bike), list price $100, the seller hopes for $90"
    assert "77" not in repr(talk)


def test_craigslist_empty_first_message_is_not_the_end(craigslist: Callable[..., ImportedLog]) -> None:
    talk = only(craigslist(haggle([says(SELLER, "hey"), says(BUYER, "hi"), says(SELLER, "so?")])))
    assert messages(talk) == [("", "hey"), ("hi", "so?"), (None, None)]
    assert talk.state(0).customer_message == ""


@pytest.mark.parametrize(
    ("closing", "last"),
    [
        ([says(BUYER, "ok"), event(BUYER, "accept")], "ok\n<accept>"),
        ([event(BUYER, "offer", {"price": 5}), event(SELLER, "accept")], "<offer $5>"),
        ([says(BUYER, "ok"), says(SELLER, "deal"), event(SELLER, "accept")], "ok"),
        ([event(BUYER, "accept"), says(SELLER, "thanks"), says(BUYER, "bye")], "<accept>"),
        ([says(BUYER, "a"), event(SELLER, "offer", "?"), event(SELLER, "accept"), event(BUYER, "accept")], "<accept>"),
    ],
)
def test_craigslist_sale_is_credited_at_the_accept(
    craigslist: Callable[..., ImportedLog], closing: list[Any], last: str
) -> None:
    talk = only(craigslist(haggle([*TALK, *closing], 1)))
    assert (talk.turns[-1].customer_message, talk.turns[-1].outcomes) == (last, (1.0,))


@pytest.mark.parametrize(
    ("closing", "sent"),
    [
        ([says(BUYER, "5?"), event(SELLER, "reject"), says(SELLER, "no"), says(BUYER, "ok")], ["hey", "<reject>"]),
        ([event(BUYER, "quit"), says(SELLER, "wait")], ["hey"]),
        ([event(BUYER, "offer", None), event(SELLER, "accept"), says(BUYER, "b")], ["hey", "<accept>"]),
    ],
)
def test_craigslist_without_sale_ends_with_the_first_closing_event(
    craigslist: Callable[..., ImportedLog], closing: list[Any], sent: list[str]
) -> None:
    talk = only(craigslist(haggle([*TALK, *closing])))
    assert [turn.business_message for turn in talk.turns] == [*sent, None]
    assert (talk.turns[-1].customer_message, talk.turns[-1].outcomes) == (None, (0.0,))


@pytest.mark.parametrize(
    ("bad", "field", "words"),
    [
        (haggle([*TALK, says(None, "x")], name="C_2"), "events[2].agent", "found None"),  # type: ignore[arg-type]
        (haggle([*TALK, says(2, "x")], name="C_2"), "events[2].agent", "found 2"),
        (haggle([*TALK, says(BUYER, "x", "0.5")], name="C_2"), "events[2].time", "earlier"),
        (haggle([*TALK, says(BUYER, "x", "soon")], name="C_2"), "events[2].time", "'soon'"),
        (haggle([*TALK, event(BUYER)], name="C_2"), "events[2].data", "expected str"),
        (haggle([*TALK, event(BUYER, "dance")], name="C_2"), "events[2].action", "'dance'"),
        (haggle([*TALK, None], name="C_2"), "events[2].agent", "missing"),
        (haggle(TALK, 2, "C_2"), "outcome.reward", "expected 0 or 1"),
        (haggle(TALK, None, "C_2"), "outcome.reward", "expected int"),
        (haggle(TALK, 1, "C_2"), "events", "nobody accepted"),
        (haggle(TALK, name="C_2", scenario={"post_id": "p"}), "scenario.kbs", "missing"),
        (haggle(TALK, name="C_2", scenario={"post_id": "p", "kbs": [side("buyer", 1)]}), "scenario.kbs", "one seller"),
        (haggle([says(BUYER, "x")], name="C_2"), None, "no transition"),
        (haggle([], name="C_2"), None, "no transition"),
        (haggle(TALK, name="C_1"), "uuid", "duplicate"),
        (None, "uuid", "missing"),
    ],
)
def test_craigslist_sets_a_bad_dialogue_aside(
    craigslist: Callable[..., ImportedLog], bad: Any, field: str | None, words: str
) -> None:
    aside = the_bad(craigslist(haggle(TALK), bad))
    assert (aside.field, aside.row) == (field, 2)
    for part in ("dev.json, row 2", words, field or ""):
        assert part in aside.reason


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[{", "truncated"),
        (b"[]", "list of dialogues"),
        (b"{}", "list of dialogues"),
        (b"\xff\xfe", "UTF-8"),
        (b"", "empty"),
    ],
)
def test_craigslist_refuses_a_bad_file(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "dev.json").write_bytes(content)
    with pytest.raises(SourceError, match=words):
        import_craigslist(tmp_path / "dev.json")


def test_craigslist_wants_exactly_one_file(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there are none"):
        import_craigslist(tmp_path)
    with pytest.raises(SourceError, match="no such file"):
        import_craigslist(tmp_path / "dev.json")
    for name in ("dev.json", "train.json"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(SourceError, match="exactly one"):
        import_craigslist(tmp_path)


def test_damaged_json_names_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1,\n "b" 2, "c": 3}')
    with pytest.raises(SourceError, match=r"a\.json, line 2, column 6"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(SourceError, match="nested too deeply"):
        read_json(tmp_path / "a.json")


# --- A team's own table -----------------------------------------------------------------------------------------


def record(turn: int = 1, **changes: Any) -> dict[str, Any]:
    row = {"conversation_id": "a", "turn": turn, "customer_message": "hi", "suggestion": "Hello there!"}
    return changed({**row, "business_message": "Hello there!", "outcome": 0.0}, **changes)


def ended(turn: int = 2, **changes: Any) -> dict[str, Any]:
    return record(turn, **{"customer_message": None, "suggestion": None, "business_message": None, **changes})


def paid(turn: int = 2, **changes: Any) -> dict[str, Any]:
    return ended(turn, **{"customer_message": "paid", "outcome": 1.0, **changes})


GOOD = [record(conversation_id="good"), paid(conversation_id="good")]


@pytest.fixture
def table(tmp_path: Path) -> Callable[..., ImportedLog]:
    def run(*rows: Any, outcomes: dict[str, float] = ONE, config: Config = CONFIG) -> ImportedLog:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
        log = import_table(tmp_path / "log.jsonl", outcomes, config.data)
        check_invariants(log)
        return log

    return run


def test_table_reads_a_conversation(table: Callable[..., ImportedLog]) -> None:
    talk = only(table(record(), paid()))
    first, last = talk.turns
    assert (first.customer_message, first.business_message, first.adoption) == ("hi", "Hello there!", "verbatim")
    assert last == Turn("paid", (1.0,))
    assert (talk.customer_id, talk.business_id) == ("a", None)


def test_table_infers_status_and_adoption(table: Callable[..., ImportedLog]) -> None:
    sent = ["hello  There!", "Hello there, you!", "No.", None]
    rows = [record(i, business_message=text or "x") for i, text in enumerate(sent, start=1)]
    rows[3] |= {"suggestion": None}
    rows += [record(5, suggestion=""), record(6, suggestion="", business_message=None), ended(7)]
    got = [(t.suggestion.text, t.suggestion.status, t.adoption) for t in actions(table(*rows)) if t.suggestion]
    assert [adoption for _, _, adoption in got] == ["verbatim", "edited", "rejected", None, None, "no_reply"]
    assert got[3][:2] == (None, "missing")
    assert got[4][:2] == ("", "abstained")


def test_table_keeps_what_is_logged(table: Callable[..., ImportedLog]) -> None:
    about = {"customer_id": 7, "business_id": "b", "context": "shop", "policy_version": "3", "arm": "champion"}
    said = {"suggestion_status": "suggested", "adoption": "edited", "behaviour_logprob": -2.5}
    rows = [record(**about, **said, timestamp="2025-01-31T12:00:00+02:00"), paid(timestamp="2025-01-31T11:00:00")]
    talk = only(table(*rows))
    assert (talk.customer_id, talk.business_id, talk.context) == ("7", "b", "shop")
    assert (talk.policy_version, talk.arm, talk.persona) == ("3", "champion", None)
    first = talk.turns[0]
    assert first.suggestion is not None
    assert (first.adoption, first.suggestion.logprob) == ("edited", -2.5)
    assert [turn.timestamp for turn in talk.turns] == [datetime(2025, 1, 31, hour, tzinfo=UTC) for hour in (10, 11)]


def test_table_names_a_customer_alike_in_every_file(tmp_path: Path) -> None:
    """pandas makes whole numbers beside nulls floats, and writes those with ".0"."""
    ids = {"conversation_id": [1.0, 1.0], "customer_id": [7.0, None], "business_id": [2, 2]}
    frame = pd.DataFrame([record(), paid()]).assign(**ids).astype(dict.fromkeys(ids, "float64"))
    frame["policy_version"] = "3.0"  # the name that somebody gave it, and not our version 3
    frame.to_parquet(tmp_path / "log.parquet")
    frame.to_csv(tmp_path / "log.csv", index=False)
    (tmp_path / "log.jsonl").write_text(
        "\n".join(json.dumps(row) for row in frame.replace({float("nan"): None}).to_dict("records"))
    )
    for name in ("log.parquet", "log.csv", "log.jsonl"):
        talk = only(import_table(tmp_path / name, ONE, CONFIG.data))
        assert (talk.conversation_id, talk.customer_id, talk.business_id, talk.policy_version) == ("1", "7", "2", "3.0")


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("1.0", "1"),
        ("-1.0", "-1"),
        ("0.0", "0"),
        ("007", "007"),
        ("007.0", "007.0"),
        ("1.10", "1.10"),
        ("v1.0", "v1.0"),
    ],
)
def test_table_keeps_ids_that_are_text(table: Callable[..., ImportedLog], given: str, name: str) -> None:
    about = {"conversation_id": given, "customer_id": given, "context": given}
    talk = only(table(record(**about), paid(**about)))
    assert (talk.conversation_id, talk.customer_id, talk.context) == (name, name, given)


@pytest.mark.parametrize("value", [1.5, 2.0**60, True])
def test_table_refuses_numbers_that_are_no_id(table: Callable[..., ImportedLog], value: Any) -> None:
    aside = the_bad(table(*GOOD, record(customer_id=value), paid(customer_id=value)))
    assert (aside.field, aside.row) == ("customer_id", 3)
    assert "expected text or null" in aside.reason


def test_table_sets_a_conversation_aside_whose_id_is_written_as_a_float(tmp_path: Path) -> None:
    rows = ["1.0,1,hi,s,s,0", "1.0,2,hi,s,s,0", "1.0,3,hi,s", *csv_talk("2.0")]
    aside = the_bad(csv_log(tmp_path, *rows))
    assert aside.row == 3


def test_table_takes_true_and_false_for_outcomes(tmp_path: Path) -> None:
    rows = [*GOOD, record(conversation_id="lost"), ended(conversation_id="lost")]
    rows = [{**row, "outcome": bool(row["outcome"])} for row in rows]
    pd.DataFrame(rows).to_parquet(tmp_path / "log.parquet")
    pd.DataFrame(rows).to_csv(tmp_path / "log.csv", index=False)
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("log.parquet", "log.csv", "log.jsonl"):
        log = import_table(tmp_path / name, ONE, CONFIG.data)
        assert not log.set_aside
        assert [(talk.turns[-1].outcomes, talk.outcome_origin) for talk in log.conversations] == [
            ((1.0,), "reported"),
            ((0.0,), "reported"),
        ]


def test_table_takes_true_and_false_for_outcomes_alone(tmp_path: Path) -> None:
    log = csv_log(tmp_path, *csv_talk("a"), "b,1,hi,s,s,FALSE", "b,2,,,,true ", "c,true,hi,s,s,0", "d,1,hi,s,s,maybe")
    assert [talk.turns[-1].outcomes for talk in log.conversations] == [(1.0,), (1.0,)]
    assert [(one.field, one.problem) for one in log.set_aside] == [
        ("turn", "expected a number, found 'true'"),
        ("outcome", "expected a number, found 'maybe'"),
    ]


def test_table_keeps_the_logs_own_adoption(table: Callable[..., ImportedLog]) -> None:
    rows = [record(adoption="verbatim", business_message="hello  There!"), record(2, adoption="rejected")]
    rows += [record(3, suggestion=None, adoption="verbatim"), record(4, suggestion="", adoption="edited"), paid(5)]
    found = [turn.adoption for turn in actions(table(*rows))]
    assert found == ["verbatim", "rejected", "verbatim", "edited"]


def test_table_drops_what_follows_an_outcome(table: Callable[..., ImportedLog]) -> None:
    talk = only(table(record(), paid(suggestion="Thanks", business_message="Thanks"), record(3), ended(4)))
    assert len(talk.turns) == 2
    assert talk.extra == {"dropped_turns": "2"}


def test_table_takes_interleaved_conversations_and_named_outcomes(table: Callable[..., ImportedLog]) -> None:
    def both(row: dict[str, Any], purchase: Any, contact: Any) -> dict[str, Any]:
        return changed(row, outcome="absent", outcome_purchase=purchase, outcome_contact=contact)

    rows = [both(record(conversation_id=name), 0, None) for name in "ab"]
    rows += [both(paid(conversation_id=name), name == "a", 1) for name in "ab"]
    log = table(*rows, outcomes={"purchase": 0.5, "contact": 0.25})
    assert [talk.turns[-1].outcomes for talk in log.conversations] == [(1.0, 1.0), (0.0, 1.0)]
    with pytest.raises(SourceError, match="'outcome_contact' is missing"):
        table(*GOOD, outcomes={"contact": 0.5, "purchase": 0.5})


TWO = {"purchase": 1.0, "contact": 0.25}


def named(row: dict[str, Any], purchase: Any = None, contact: Any = None) -> dict[str, Any]:
    return changed(row, outcome="absent", outcome_purchase=purchase, outcome_contact=contact)


def test_table_carries_an_earlier_outcome_to_the_last_one(table: Callable[..., ImportedLog]) -> None:
    called = named(record(2, customer_message="call me"), contact=0.5)
    again = named(record(4, customer_message="again", suggestion="A", business_message="A"), 0, 1)
    rows = [named(record()), called, named(record(3)), again, named(paid(5), 1, 0), named(record(6))]
    talk = only(table(*rows, outcomes=TWO))
    assert [turn.outcomes for turn in talk.turns] == [(0.0, 0.0)] * 4 + [(1.0, 1.0)]
    assert [turn.customer_message for turn in talk.turns] == ["hi", "call me", "hi", "again", "paid"]
    acted = talk.turns[3]
    assert acted.suggestion is not None
    assert (acted.suggestion.text, acted.business_message, acted.adoption) == ("A", "A", "verbatim")
    assert talk.extra == {"dropped_turns": "1"}


def test_table_ends_at_the_one_row_with_outcomes(table: Callable[..., ImportedLog]) -> None:
    rows = [named(record()), named(paid(customer_message=None), 0, 1), named(record(3)), named(ended(4))]
    talk = only(table(*rows, outcomes=TWO))
    assert talk.turns[-1] == Turn(None, (0.0, 1.0))
    assert talk.extra == {"dropped_turns": "2"}


def test_table_leaves_out_an_event_on_the_way_and_keeps_its_outcome(table: Callable[..., ImportedLog]) -> None:
    event = named(ended(), contact=1)
    talk = only(
        table(named(record()), event, named(record(3)), named(ended(4), contact=0.5), named(paid(5), 1), outcomes=TWO)
    )
    assert [turn.customer_message for turn in talk.turns] == ["hi", "hi", "paid"]
    assert [turn.outcomes for turn in talk.turns] == [(0.0, 0.0), (0.0, 0.0), (1.0, 0.5)]
    assert talk.extra == {"dropped_turns": "0"}


def test_table_ends_at_an_outcome_that_nothing_can_follow(table: Callable[..., ImportedLog]) -> None:
    unanswered = [named(record()), named(paid(2), contact=1)]
    talk = only(table(*unanswered, named(record(3)), named(paid(4), 1), outcomes=TWO))
    assert (talk.turns[-1], talk.extra) == (Turn("paid", (0.0, 1.0)), {"dropped_turns": "2"})
    at_once = only(table(*unanswered, named(paid(3), 1), outcomes=TWO))
    assert (at_once.turns[-1], at_once.extra) == (Turn("paid", (1.0, 1.0)), {"dropped_turns": "1"})
    odd = named(paid(2, customer_message=None, business_message="Thanks"), contact=1)
    ended_so = only(table(named(record()), odd, named(record(3)), named(paid(4), 1), outcomes=TWO))
    assert (ended_so.turns[-1], ended_so.extra) == (Turn(None, (0.0, 1.0)), {"dropped_turns": "2"})


def test_what_follows_an_outcome_is_told(tmp_path: Path) -> None:
    def told(*rows: dict[str, Any]) -> list[str]:
        (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
        overrides = {"source.kind": "table", "source.path": str(tmp_path / "log.jsonl")}
        config = load_config(None, {**overrides, "data.root": str(tmp_path / "data"), "outcomes": ONE})
        return list(read_logs(config).told())

    assert told(*GOOD) == ["1 conversations imported, 0 set aside"]
    more = [row | {"conversation_id": name} for name in "ab" for row in (record(), paid(), record(3), ended(4))]
    assert told(*GOOD, *more)[1:] == ["2 conversations went on after the outcome; 4 later turns left out"]
    assert told(*more[:3])[1:] == ["1 conversation went on after the outcome; 1 later turn left out"]


def flattened(tmp_path: Path, *outcomes: tuple[float, float], **settings: Any) -> Config:
    """A log of conversations with the outcomes of their two rows."""
    talks = [
        (record(conversation_id=f"c{k}", outcome=a), paid(conversation_id=f"c{k}", outcome=b))
        for k, (a, b) in enumerate(outcomes)
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(row) for talk in talks for row in talk))
    overrides = {"source.kind": "table", "source.path": str(tmp_path / "log.jsonl"), "outcomes": {"sold": 1.0}}
    return load_config(None, overrides | {"data.root": str(tmp_path / "data")} | settings)


def test_a_log_is_refused_where_many_outcomes_are_out_of_range(tmp_path: Path) -> None:
    config = flattened(tmp_path, *[(0, 0)] * 8, (0, 1.5), (0, 37.25))
    found = (
        r"log\.jsonl: 'outcome' of 2 of 10 conversations \(20\.0%, data\.quarantine_share allows 10\.0%\) is out of "
        r"range: expected 0 to 1, found 1\.5 to 37\.25 there; set data\.outcome_low and data\.outcome_high, or for it "
        r"alone data\.outcome_ranges: \{sold: \[LEAST, GREATEST\]\}; see .*quarantine"
    )
    with pytest.raises(SourceError, match=found):
        read_logs(config)
    (quarantined,) = (tmp_path / "data" / "quarantine").glob("*.json")
    assert [one["outcome"] for one in json.loads(quarantined.read_text())] == [1.5, 37.25]
    mended = flattened(tmp_path, (0, 0), (0, 37.25), **{"data.outcome_ranges": {"sold": [0, 50]}})
    assert len(read_logs(mended).conversations) == 2


def test_a_log_is_refused_where_many_outcomes_stand_before_the_end(tmp_path: Path) -> None:
    config = flattened(tmp_path, *[(0, 0)] * 3, *[(1, 1)] * 2)
    with pytest.raises(
        SourceError, match=r"'outcome' of 2 of 5 .* stands before the end: .* last row .* write 0 or null"
    ):
        read_logs(config)
    assert (
        import_table(tmp_path / "log.jsonl", ONE, CONFIG.data)
        .set_aside[0]
        .reason.endswith(
            "row 7, field 'outcome': stands before the end: expected in the last row, found 1 in the first of 2"
        )
    )


def test_a_log_goes_on_with_a_warning_where_much_else_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert len(read_logs(flattened(tmp_path, *[(0, 0)] * 9, (0, 2))).conversations) == 9
    assert not caplog.records
    assert len(read_logs(flattened(tmp_path, (0, 0), ("x", 0))).conversations) == 1  # type: ignore[arg-type]
    assert "1 of 2 conversations (50.0%, data.quarantine_share allows 10.0%) are set aside; see" in caplog.text
    assert [one.levelname for one in caplog.records] == ["WARNING"]


def test_conversations_that_are_still_open_are_not_amiss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = flattened(tmp_path)
    rows = [record(timestamp=f"2025-01-0{day}", conversation_id=f"c{day}") for day in (1, 8, 9)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert read_logs(config).set_aside == {"open: not closed yet": 2}
    assert not caplog.records


def of_twelve(tmp_path: Path, **settings: Any) -> Config:
    """Of a log of three versions' conversations."""
    named = [{"conversation_id": f"c{k}", "policy_version": ("1", "v7", None)[k % 3]} for k in range(12)]
    rows = [row | one for one in named for row in (record(), paid())]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, rows)))
    overrides = {"source.kind": "table", "source.path": str(tmp_path / "log.jsonl"), "outcomes": ONE}
    return load_config(None, overrides | {"data.root": str(tmp_path / "data"), "data.evidence_share": 0.5} | settings)


def test_a_first_log_without_log_probs_is_told_before_its_policy_is_made(tmp_path: Path) -> None:
    config = of_twelve(tmp_path, **{"q.target": "retrace"})
    with pytest.raises(TrainingError, match=r"q\.target retrace .* none of its fit part has one: .* to fqe"):
        import_logs(config, before_ours=True)
    assert not list(tmp_path.rglob("*.parquet")), "so that the cure is tried on the same store"


def test_of_a_log_that_grows_only_what_is_new_is_taken(tmp_path: Path) -> None:
    config = of_twelve(tmp_path)
    first, _ = import_logs(config)
    assert first is not None and take_up(config, 0)
    assert import_logs(config)[0] is None
    log = tmp_path / "log.jsonl"
    new = [record(conversation_id="new"), paid(conversation_id="new")]
    log.write_text("\n".join([log.read_text(), *map(json.dumps, new)]))
    second, found = import_logs(config)
    assert second is not None and set(read(second, config.outcomes)["conversation_id"]) == {"new"}
    assert "12 conversations left out: here already, by an earlier delivery" in list(found.told())
    assert [file.name for file in take_up(config, 0)] == sorted([first.name, second.name])


@pytest.mark.parametrize("changed", [{"data.split_by": "business"}, {"data.evidence_share": 0.4}])
def test_a_first_log_that_was_divided_by_other_settings_is_refused(tmp_path: Path, changed: dict[str, Any]) -> None:
    """Else pi_0 would be cloned from what Q and the gate take for unseen."""
    config = of_twelve(tmp_path, **{"source.path": str(tmp_path / "many.jsonl")})
    told = [{"conversation_id": f"d{k}", "business_id": f"b{k % 40}"} for k in range(120)]
    rows = [row | one for one in told for row in (record(), paid())]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, rows)))
    import_logs(config, before_ours=True)
    take_up(config, 0)
    assert len(_taken_up(config)) == 240
    another = of_twelve(tmp_path, **{"source.path": str(tmp_path / "many.jsonl")}, **changed)
    with pytest.raises(ConfigError, match=r"holds the log divided by others; put those back"):
        _taken_up(another)


def test_a_date_in_the_future_closes_no_conversation(table: Callable[..., ImportedLog]) -> None:
    now = datetime.now(UTC)

    def at(hours: float, **changes: Any) -> dict[str, Any]:
        return record(timestamp=(now + timedelta(hours=hours)).isoformat(), **changes)

    sold = [at(-5, conversation_id="s"), paid(conversation_id="s", timestamp=at(-4)["timestamp"])]
    waiting = at(-3, conversation_id="w")
    skewed = [at(-5, conversation_id="f"), paid(conversation_id="f", timestamp=at(720)["timestamp"])]
    log = table(*sold, waiting, *skewed)
    assert {talk.conversation_id for talk in log.conversations} == {"s", "f"}
    assert [one.conversation_id for one in log.set_aside if one.still_open] == ["w"]


def test_versions_that_a_first_log_names_are_none_of_ours(tmp_path: Path) -> None:
    config = of_twelve(tmp_path)

    def imported(before_ours: bool) -> pd.DataFrame:
        return read(import_logs(config, before_ours)[0], config.outcomes)

    assert set(imported(before_ours=False)["policy_version"]) == {"1", "v7", "logged"}
    first = imported(before_ours=True)
    assert set(first["policy_version"]) == {"logged 1", "logged v7", "logged"}
    assert of_policy(first, "logged").all() and not of_policy(first, "1").any()


def test_table_without_times_takes_silence_for_the_end(table: Callable[..., ImportedLog]) -> None:
    talk = only(table(record(), record(2, business_message=None)))
    assert [turn.terminal for turn in talk.turns] == [False, False, True]
    assert talk.turns[1].adoption == "no_reply"
    assert talk.turns[-1] == Turn(None, (0.0,))


def test_table_counts_open_conversations(table: Callable[..., ImportedLog]) -> None:
    times = {"left": "2025-01-01T00:00:00Z", "open": "2025-01-03T00:00:00Z", "new": "2025-01-05T00:00:00Z"}
    rows = [record(conversation_id=name, timestamp=time) for name, time in times.items()]
    log = table(*rows, ended(conversation_id="new", timestamp=None), record(conversation_id="timeless"))
    assert [talk.conversation_id for talk in log.conversations] == ["left", "new"]
    assert [aside.conversation_id for aside in log.set_aside] == ["open", "timeless"]
    assert all(aside.still_open and aside.reason.startswith("open: ") for aside in log.set_aside)
    assert "log.jsonl, row 2, field 'timestamp'" in log.set_aside[0].reason
    assert {aside.kind for aside in log.set_aside} == {"open: not closed yet"}


def test_rows_of_a_conversation_come_in_any_order(table: Callable[..., ImportedLog]) -> None:
    """As a database gives them: `turn` says when each was said."""
    talk = only(table(paid(2, customer_message="second"), record(customer_message="first")))
    assert [turn.customer_message for turn in talk.turns[:2]] == ["first", "second"]


def test_a_torn_line_of_a_file_from_windows_is_told_as_any_other(tmp_path: Path) -> None:
    lines = [json.dumps(record()), json.dumps(ended(2)), '{"conversation_id": "torn", "turn": 1, "outc', "[1]"]
    (tmp_path / "log.jsonl").write_bytes("\r\n".join(lines).encode())
    log = import_table(tmp_path / "log.jsonl", {"purchase": 1.0}, load_config().data)
    assert len(log.conversations) == 1
    reasons = [aside.reason.partition("row ")[2] for aside in log.set_aside]
    assert reasons[0].startswith("3: expected one JSON object a line, found Unterminated string")
    assert reasons[1] == "4: expected one JSON object a line, found [1]"
    assert {aside.kind for aside in log.set_aside} == {"expected one JSON object a line"}


def test_reasons_are_counted_without_what_was_found(table: Callable[..., ImportedLog]) -> None:
    bad = [record(3 + k, conversation_id=f"from-{3 + k}") for k in range(2)]
    assert {aside.kind for aside in table(*GOOD, *bad).set_aside} == {
        "turn: must count 1, 2, 3, ... without gap or repeat"
    }


@pytest.mark.parametrize(
    ("rows", "field", "row", "words"),
    [
        ([record(), paid(3)], "turn", 4, "expected 2, found 3"),
        ([record(), record(), paid()], "turn", 4, "expected 2"),
        ([record("one")], "turn", 3, "expected a number"),  # type: ignore[arg-type]
        ([record(turn="absent")], "turn", 3, "missing"),  # type: ignore[arg-type]
        ([record(conversation_id=None)], "conversation_id", 3, "found none"),
        ([record(customer_message=5)], "customer_message", 3, "expected text or null"),
        ([record(customer_message="\ud800")], "customer_message", 3, "expected text"),
        ([record(customer_message=None), paid()], "customer_message", 3, "something follows"),
        ([record(), ended(), paid(3)], "customer_message", 4, "null before the last row"),
        ([record(business_message=None), paid()], "business_message", 3, "join"),
        ([record(suggestion_status="offered")], "suggestion_status", 3, "'offered'"),
        ([record(suggestion_status="missing")], "suggestion_status", 3, "does not go with"),
        ([record(adoption="liked")], "adoption", 3, "'liked'"),
        ([record(adoption="no_reply")], "adoption", 3, "does not go with"),
        ([record(behaviour_logprob=0.5)], "behaviour_logprob", 3, "at most 0"),
        ([record(outcome=2)], "outcome", 3, "expected 0 to 1, found 2"),
        ([record(outcome=float("nan"))], "outcome", 3, "expected a number"),
        ([record(outcome=10**400)], "outcome", 3, "expected a number"),
        ([record(outcome="absent")], "outcome", 3, "missing"),
        ([record(timestamp="yesterday")], "timestamp", 3, "ISO 8601"),
        ([record(timestamp=5)], "timestamp", 3, "ISO 8601"),
        ([record(timestamp="2025-01-02"), paid(timestamp="2025-01-01")], "timestamp", 4, "earlier"),
        ([record(customer_id="x"), paid(customer_id="y")], "customer_id", 4, "not the same"),
        ([paid(1)], None, 3, "no transition"),
        ([record(), '{"conversation_id": "a", "turn": 2, "outc'], None, 4, "one JSON object a line"),
        (["[1]"], None, 3, "found [1]"),
    ],
)
def test_table_sets_the_conversation_of_a_bad_row_aside(
    table: Callable[..., ImportedLog], rows: list[Any], field: str | None, row: int, words: str
) -> None:
    aside = the_bad(table(*GOOD, *rows))
    assert (aside.field, aside.row) == (field, row)
    assert not aside.still_open
    for part in (f"log.jsonl, row {row}", words, field or ""):
        assert part in aside.reason


def test_table_csv_tells_null_from_empty(tmp_path: Path) -> None:
    file = tmp_path / "log.csv"
    header = "conversation_id,turn,customer_message,suggestion,business_message,outcome,timestamp\n"
    rows = (
        'a,1,"hi,\nyou",,"x",0,2025-01-01T00:00:00Z\n\na,2,NA,"",y,0,\na,3,,,,0,\nb,1,a,b\nb,2,,,,0,\n007,1,a,b,c,0,\n'
    )
    file.write_text(header + rows + "007,2,d,,,1,\n", encoding="utf-8-sig")
    log = import_table(file, ONE, CONFIG.data)
    check_invariants(log)
    first, second = log.conversations
    assert [turn.suggestion.status for turn in first.turns if turn.suggestion] == ["missing", "abstained"]
    assert [turn.customer_message for turn in first.turns] == ["hi,\nyou", "NA", None]
    assert second.conversation_id == "007"
    aside = the_bad(log, good=2)
    assert (aside.conversation_id, aside.row) == ("b", 4)
    assert "expected 7 columns, found 4" in aside.reason


def test_table_knows_how_mysql_writes_null(tmp_path: Path) -> None:
    """Unquoted it is null; a customer who writes it has written it."""
    log = csv_log(tmp_path, r"a,1,hi,\N,s,\N", r'a,2,"\N",s,s,\N', r"a,3,\N,\N,\N,1")
    first, second, last = only(log).turns
    assert first.suggestion and first.suggestion.status == "missing" and last.customer_message is None
    assert second.customer_message == r"\N"
    assert last.outcomes == (1.0,)


@pytest.mark.parametrize("quoting", [csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC], ids=["all", "nonnumeric"])
def test_table_reads_a_csv_that_quotes_what_is_missing(tmp_path: Path, quoting: Any) -> None:
    """An empty text is no number, time, status or adoption, so it is null there; among texts it is one."""
    columns = [*HEADER.split(","), "timestamp", "behaviour_logprob", "adoption", "suggestion_status"]
    rows = [
        ["a", 1, "hi", "s", "s", None, "2025-01-01T00:00:00Z", -1.5, "verbatim", "suggested"],
        ["a", 2, "and", "", "s", None, None, None, None, None],
        ["a", 3, None, None, None, 1, None, None, None, None],
    ]
    with (tmp_path / "log.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=quoting).writerows([columns, *rows])
    first, second, last = only(import_table(tmp_path / "log.csv", ONE, CONFIG.data)).turns
    assert first.adoption == "verbatim" and first.suggestion and first.suggestion.logprob == -1.5
    assert second.suggestion and second.suggestion.status == "abstained" and second.timestamp is None
    assert last.outcomes == (1.0,)


def test_an_empty_text_for_an_outcome_reports_nothing(tmp_path: Path) -> None:
    log = csv_log(tmp_path, *csv_talk("a"), 'b,1,hi,s,s,""', 'b,2,,,,""')
    assert {talk.conversation_id: talk.outcome_origin for talk in log.conversations} == {"a": "reported", "b": None}


HEADER = "conversation_id,turn,customer_message,suggestion,business_message,outcome"


def csv_log(folder: Path, *lines: str, end: str = "\n") -> ImportedLog:
    (folder / "log.csv").write_bytes(end.join([HEADER, *lines, ""]).encode())
    log = import_table(folder / "log.csv", ONE, CONFIG.data)
    check_invariants(log)
    return log


def csv_talk(name: str, message: str = "hi") -> list[str]:
    return [f"{name},1,{message},s,s,0", f"{name},2,,,,1"]


def test_table_refuses_a_csv_with_a_quote_that_is_open_at_the_end(tmp_path: Path) -> None:
    lines = [line for k in range(20) for line in csv_talk(f"t{k}", '"one,\ntwo"')]
    lines[38] = lines[38].replace('"one,\ntwo"', '"one')
    with pytest.raises(SourceError, match=r"log\.csv, row 39 \(line 59\), field 'customer_message': expected a clos"):
        csv_log(tmp_path, *lines)
    with pytest.raises(SourceError, match=r"no readable row; the first problem: .*row 1, .*a quote that is opened"):
        csv_log(tmp_path, 'a,1,"hi,s,s,0', 'b,1,"hello,s,s,0')
    with pytest.raises(SourceError, match=r"row 2 \(line 3\), field 'conversation_id'"):
        csv_log(tmp_path, csv_talk("a")[0], '"a,2,,,,1', *csv_talk("b"))


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("opens", "between", "closes", "lost"),
    [
        ("hi", 3, '"hello,s,s,0', {"t1", "t2", "t3", "t4", "t5"}),  # the columns fit again
        ("hi", 0, '"hello,s,s,0', {"t1", "t2"}),  # no whole row in the quotes
        ("hi", 0, 'hi,"s, t",s,0', {"t1", "t2"}),
        ("hi", 2, '"hello, you",s,s,0', {"t1", "t2", "t3", "t4"}),  # a good quote closes: too many columns
        ("hi", 0, '5" wide,s,s,0', {"t1", "t2"}),
        ("hi", 1, '"one\ntwo",s,s,0', {"t1", "t2", "t3"}),  # too few columns, and the id is all there is
        ("hi, you", 1, '"hello,s,s,0', {"t1", "t2", "t3"}),
        ("x" * 140_000, 1, '"hello,s,s,0', {"t1", "t2", "t3"}),  # longer than the csv module takes
    ],
)
def test_table_names_the_conversations_that_a_stray_quote_swallows(
    tmp_path: Path, opens: str, between: int, closes: str, lost: set[str], end: str
) -> None:
    swallowed = [line for k in range(between) for line in csv_talk(f"t{k + 2}")]
    first, closing, rest = csv_talk("t1", f'"{opens}'), f"t{between + 2},1,{closes}", csv_talk(f"t{between + 2}")[1]
    rows = [*csv_talk("t0"), first[1], first[0], *swallowed, closing, rest, *csv_talk("end")]
    log = csv_log(tmp_path, *rows, end=end)
    assert [talk.conversation_id for talk in log.conversations] == ["t0", "end"]
    named = [aside for aside in log.set_aside if aside.conversation_id in lost]
    assert {aside.conversation_id for aside in named} == lost
    assert len(named) == len(lost)
    assert {(aside.row, aside.field) for aside in named} == {(4, "customer_message")}
    assert {aside.kind for aside in named} == {"customer_message: a quote that is opened and not closed?"}
    assert "log.csv, row 4, field 'customer_message': a quote" in named[0].reason
    assert f"found {len(swallowed) + 1} more lines in its quotes" in named[0].reason


@pytest.mark.parametrize(
    ("field", "closed"),
    [
        (r'"the \"which size\" offer"', True),
        (r'"\"hi\""', True),
        (r'"5\""', True),
        (r'"say \"one, two\"' + "\n" + r'or \"three\""', True),
        (r'"5\""', False),  # no other quote in the file
    ],
)
def test_table_refuses_a_csv_whose_quotes_are_escaped_by_a_backslash(tmp_path: Path, field: str, closed: bool) -> None:
    rows = [*csv_talk("t0"), *csv_talk("t1", field), *csv_talk("end", '"hi, you"' if closed else "hi")]
    found = r"log\.csv, row 3 \(line 4\), field 'customer_message': expected quotes .* doubled, .* by a backslash; doub"
    with pytest.raises(SourceError, match=found):
        csv_log(tmp_path, *rows)


def test_table_sets_text_after_a_closing_quote_aside(tmp_path: Path) -> None:
    rows = [*csv_talk("t0"), *csv_talk("t1", '"hi" there'), *csv_talk("t2", '"one,\ntwo" "three"'), *csv_talk("end")]
    log = csv_log(tmp_path, *rows)
    assert [talk.conversation_id for talk in log.conversations] == ["t0", "end"]
    assert [(aside.conversation_id, aside.row, aside.field) for aside in log.set_aside] == [
        ("t1", 3, "customer_message"),
        ("t2", 5, "customer_message"),
    ]
    assert {aside.kind for aside in log.set_aside} == {"customer_message: text after a closing quote"}
    assert "expected a comma or the line's end, found ' there'; double the quotes" in log.set_aside[0].reason


def test_table_keeps_no_part_of_a_conversation_whose_turn_a_quote_hides(tmp_path: Path) -> None:
    header = "conversation_id,customer_message,suggestion,business_message,outcome,turn"
    rows = ["a,hi,s,s,0,1", "a,hi,s,s,0,2", 'a,"hi" there, you",s,s,0,3', "b,hi,s,s,0,1", "b,,,,1,2"]
    (tmp_path / "log.csv").write_text("\n".join([header, *rows]))
    aside = the_bad(import_table(tmp_path / "log.csv", ONE, CONFIG.data))
    assert (aside.conversation_id, aside.row, aside.field) == ("a", 3, "customer_message")


def test_table_keeps_apostrophes_backslashes_and_quotes_as_they_are(tmp_path: Path) -> None:
    told = [
        "it's 5'",
        '"C:\\"',
        '"say ""C:\\"" , you"',
        r'5\" by 6"',
        'the "big" one',
        '""',
        '""""',
        r'"a\b, c"',
        '"hi" ',
    ]
    log = csv_log(tmp_path, *(line for k, words in enumerate(told) for line in csv_talk(f"t{k}", words)))
    assert not log.set_aside
    heard = [talk.turns[0].customer_message for talk in log.conversations]
    assert heard[:5] == ["it's 5'", "C:\\", 'say "C:\\" , you', r'5\" by 6"', 'the "big" one']
    assert heard[5:] == ["", '"', r"a\b, c", "hi "], "white space before the comma says nothing"


def test_table_reads_a_csv_record_of_any_length(tmp_path: Path) -> None:
    rows = [*csv_talk("t0"), *csv_talk("t1", "é" * 1_500_000), *csv_talk("t2", f'"{"one, two" * 300_000}"')]
    log = csv_log(tmp_path, *rows, *csv_talk("end"))
    assert not log.set_aside
    heard = [len(talk.turns[0].customer_message or "") for talk in log.conversations]
    assert heard == [2, 1_500_000, 2_400_000, 2]


def test_table_keeps_messages_of_several_lines_in_csv(tmp_path: Path) -> None:
    """With commas, quotes, numbers and all but a row of the log in them."""
    told = [
        "a,\nb,2,c",
        "1,2,3,4,5,6\nx,y,1,2,3,4",
        'he said ""no, 1"",\n5,1',
        "\n\n",
        "x\nb,1,s,s,0\nb,1,hi,s,s,0,0\nb,one,hi,s,s,0\n",
    ]
    lines = [line for k, words in enumerate(told) for line in csv_talk(f"t{k}", f'"{words}"')]
    log = csv_log(tmp_path, *lines, 't9,1,5" wide,s,"s"" ",0', "t9,2,,,,1")
    assert not log.set_aside
    heard = [talk.turns[0].customer_message for talk in log.conversations]
    assert heard == [*(words.replace('""', '"') for words in told), '5" wide']


def test_table_reads_a_folder_and_its_own_turn_table(tmp_path: Path) -> None:
    source = tmp_path / "log"
    source.mkdir()
    (source / "b.jsonl").write_text("\n".join(json.dumps(row) for row in GOOD))
    rows = [record(timestamp="2025-01-01"), ended(timestamp=None)]
    pd.DataFrame(rows).astype({"turn": "int32", "timestamp": "datetime64[ns]"}).to_parquet(source / "a.parquet")
    log = import_table(source, ONE, CONFIG.data)
    assert [talk.conversation_id for talk in log.conversations] == ["a", "good"]
    assert type(log.conversations[0].turns[0].timestamp) is datetime
    write(to_frame(log.conversations, ONE, 0.15), tmp_path / "turns.parquet", ONE)
    again = import_table(tmp_path / "turns.parquet", ONE, CONFIG.data)
    assert not again.set_aside
    assert [talk.turns for talk in again.conversations] == [talk.turns for talk in log.conversations]


def test_files_that_are_not_read_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = "\n".join(json.dumps(row) for row in GOOD)
    for name in ("a.JSONL", ".hid.jsonl", "._a.jsonl", "README.md", "b.jsonl.gz", "sub/deep/c.csv", "docs/d.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(good)
    assert only(import_table(tmp_path, ONE, CONFIG.data)).conversation_id == "good"
    assert [record.name for record in caplog.records] == ["iterative_ppo.sources.log"]
    assert "not read: b.jsonl.gz, sub/; only files" in caplog.text
    (tmp_path / "a.JSONL").unlink()
    found = r"there are none; found README\.md, b\.jsonl\.gz, docs/, sub/; unpack"
    with pytest.raises(SourceError, match=found):
        import_table(tmp_path, ONE, CONFIG.data)


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [(pa.timestamp("us"), 2**62, "date value out of range"), (pa.timestamp("us", "Mars/Phobos"), 5, "Mars/Phobos")],
)
def test_table_refuses_a_time_that_python_cannot_hold(tmp_path: Path, kind: Any, value: int, words: str) -> None:
    frame = pa.Table.from_pylist([record(), paid()]).append_column("timestamp", pa.array([None, value], kind))
    pq.write_table(frame, tmp_path / "log.parquet")
    with pytest.raises(SourceError, match=rf"log\.parquet, row 2, field 'timestamp': expected a timestamp.*{words}"):
        import_table(tmp_path, ONE, CONFIG.data)


@pytest.mark.parametrize(
    ("weight", "outcome", "good"),
    [(1.0, 1, True), (0.5, 1, True), (0.5, 0.5, True), (0.5, 0, False), (1.0, None, True)],
)
def test_table_refuses_an_outcome_that_contradicts_the_named_one(
    table: Callable[..., ImportedLog], weight: float, outcome: Any, good: bool
) -> None:
    rows = [record(outcome_purchase=None), paid(outcome_purchase=1, outcome=outcome)]
    log = table(*({**row, "outcome_purchase": row["outcome"]} for row in GOOD), *rows, outcomes={"purchase": weight})
    assert len(log.conversations) == 1 + good
    for aside in log.set_aside:
        assert (aside.conversation_id, aside.row, aside.field) == ("a", 4, "outcome")
        assert "contradicts outcome_purchase: expected 1, found 0" in aside.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"suggestion": "absent", "sugestion": "x"}, r"'suggestion' is missing \(did you mean 'sugestion'\?\)"),
        ({"adoptoin": "edited"}, r"unknown column 'adoptoin' \(did you mean 'adoption'\?\)"),
        ({"TIMESTAMP": None}, r"unknown column 'TIMESTAMP' \(did you mean 'timestamp'\?\); rename it"),
        ({"Customer_Id": "x"}, r"unknown column 'Customer_Id' \(did you mean 'customer_id'\?\); rename it"),
        ({"turn": "absent", "TURN": 1}, r"unknown column 'TURN' \(did you mean 'turn'\?\); rename it"),
        ({"OUTCOME": 1, "outcome": "absent"}, r"unknown column 'OUTCOME' \(did you mean 'outcome'\?\); rename it"),
        ({"outcome": "absent", "outcome_contact": 1}, r"expected a column 'outcome_purchase' or 'outcome'"),
    ],
)
def test_table_names_the_nearest_column(table: Callable[..., ImportedLog], changes: dict[str, Any], words: str) -> None:
    with pytest.raises(SourceError, match=words):
        table(record(**changes), paid(**changes))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("log.jsonl", b"", "empty"),
        ("log.jsonl", b'[\n{"a": 1}', "missing"),
        ("log.jsonl", b"[1]\n[2", "no readable row; the first problem"),
        ("log.jsonl", b'{"a": "\xff"}', "byte 7: expected UTF-8"),
        ("log.csv", b"conversation_id,turn\n", "no readable row"),
        ("log.csv", b"a,a\n1,2\n", "same name"),
        ("log.csv", b"conversation_id;turn\na;1\n", r"one column with ';' in it: expected commas; convert"),
        ("log.csv", b"conversation_id\tturn\na\t1\n", r"one column with '\\t' in it: expected commas; convert"),
        ("log.csv", b"a,b\n1,\xe9\n", "byte 6: expected UTF-8"),
        ("log.parquet", b"PAR1 cut", "expected a Parquet file"),
        ("log.parquet", b"", "expected a Parquet file"),
        ("log.xlsx", b"x", "expected a file that ends in .parquet, .csv, .jsonl"),
    ],
)
def test_table_refuses_a_bad_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=words):
        import_table(tmp_path / name, ONE, CONFIG.data)


def test_table_needs_something_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="there are none"):
        import_table(tmp_path, ONE, CONFIG.data)
    with pytest.raises(SourceError, match="no such file"):
        import_table(tmp_path / "log.csv", ONE, CONFIG.data)


# --- By name ----------------------------------------------------------------------------------------------------


def test_sources_by_name(tmp_path: Path) -> None:
    assert list(SOURCES) == ["star", "craigslist", "table"]
    with pytest.raises(SourceError, match=r"'stars' \(did you mean 'star'\?\)"):
        importer("stars")
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(row) for row in GOOD))
    config = load_config(overrides={"source.kind": "table", "source.path": str(tmp_path)})
    assert only(import_log(config)).conversation_id == "good"
    with pytest.raises(ConfigError, match=r"source\.path"):
        import_log(load_config(overrides={"source.kind": "star"}))
    with pytest.raises(SourceError, match="unknown source 'renovation'"):
        import_log(CONFIG)
    two = load_config(overrides={"outcomes": {"purchase": 1.0, "contact": 0.5}})
    for name in ("star", "craigslist"):
        with pytest.raises(ConfigError, match="exactly one"):
            SOURCES[name](tmp_path, two)


# --- The public logs --------------------------------------------------------------------------------------------


def won(log: ImportedLog) -> int:
    return sum(talk.turns[-1].outcomes == (1.0,) for talk in log.conversations)


def no_transition(log: ImportedLog, outcome: int) -> int:
    return sum(
        f"no transition: nothing was answered before the end (outcome {outcome})" in s.reason for s in log.set_aside
    )


@pytest.mark.shared
def test_star_figures() -> None:
    log = SOURCES["star"](shared("star"), CONFIG)
    check_invariants(log)
    assert len(log.conversations) + len(log.set_aside) == 2081
    assert sum("no user turn" in aside.reason for aside in log.set_aside) == 132
    assert (no_transition(log, 0), no_transition(log, 1)) == (64, 4)
    assert (won(log), won(log) + no_transition(log, 1)) == (1293, 1297)
    assert (
        sum(int(talk.extra["dropped_turns"]) for talk in log.conversations) == 2465
    )  # of 2,481; the others are set aside
    statuses = Counter((t.suggestion.status, t.adoption) for t in actions(log) if t.suggestion)
    assert statuses == {
        ("suggested", "verbatim"): 6909,
        ("suggested", "rejected"): 905,
        ("missing", "rejected"): 1332,
        ("missing", None): 118,
    }
    assert statuses.total() == 9264


@pytest.mark.shared
def test_star_keeps_leaks_out() -> None:
    path = shared("star")
    for talk in import_star(path).conversations[:200]:
        raw = read_json(path / "dialogues" / f"{talk.conversation_id}.json")
        told = {event["Text"] for event in raw["Events"] if event["Agent"] == "UserGuide"}
        assert not any(text in repr(talk) for text in told)
        assert talk.context == raw["Scenario"]["WizardCapabilities"][0]["Task"].replace("_", " ")


@pytest.mark.shared
def test_craigslist_figures() -> None:
    log = SOURCES["craigslist"](shared("craigslist"), CONFIG)
    check_invariants(log)
    assert len(log.conversations) + len(log.set_aside) == 643
    assert len(actions(log)) == 2342
    assert (won(log), won(log) + no_transition(log, 1), len(log.set_aside)) == (453, 461, 10)
    assert {(t.suggestion.status, t.adoption) for t in actions(log) if t.suggestion} == {("suggested", "verbatim")}
    assert all(turn.suggestion.text for turn in actions(log) if turn.suggestion)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["star", "craigslist"])
def test_public_logs_go_through_the_turn_table(name: str, tmp_path: Path) -> None:
    log = SOURCES[name](shared(name), CONFIG)
    write(to_frame(log.conversations, ONE, 0.15), tmp_path / "turns.parquet", ONE)
    again = {talk.conversation_id: talk.turns for talk in conversations(read(tmp_path / "turns.parquet", ONE))}
    assert again == {talk.conversation_id: talk.turns for talk in log.conversations}
