"""The turn table gives every conversation back unchanged, and refuses by name what is no turn table."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterative_ppo.errors import StoreError, TurnTableError
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import (
    ABSTAIN,
    ADOPTIONS,
    MISSING,
    PARTS,
    Conversation,
    Suggestion,
    Turn,
    part_of,
)
from iterative_ppo.mdp.turn_table import ORIGIN, SCHEMA_VERSION, actions, conform, conversations, last_rows, to_frame

OUTCOMES = {"purchase": 1.0, "contact": 0.5}
Read = Callable[[Path, dict[str, float]], pd.DataFrame]

# --- any conversation ------------------------------------------------------------------------------------------------

TEXT = st.text(max_size=20)
OPTIONAL_TEXT = st.none() | TEXT
NUMBER = st.floats(-1e9, 1e9)
STAMP = st.none() | st.datetimes(datetime(1900, 1, 1), datetime(2250, 1, 1), timezones=st.just(UTC))
LOGPROB = st.none() | st.floats(-1e4, 0.0)
SUGGESTION = st.one_of(
    st.builds(Suggestion, TEXT, st.just("suggested"), LOGPROB),
    st.builds(Suggestion, st.just(""), st.just("abstained"), LOGPROB),
    st.sampled_from([ABSTAIN, MISSING]),
)


def turns(names: int) -> st.SearchStrategy[tuple[Turn, ...]]:
    """Turns with `names` outcomes each; the last is terminal."""
    outcomes = st.tuples(*[NUMBER] * names)
    adoption = st.none() | st.sampled_from(ADOPTIONS)
    acted = st.builds(Turn, TEXT, outcomes, SUGGESTION, OPTIONAL_TEXT, adoption, STAMP)
    last = st.builds(Turn, OPTIONAL_TEXT, outcomes, timestamp=STAMP)
    return st.builds(lambda some, end: (*some, end), st.lists(acted, max_size=4), last)


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, float], list[Conversation]]:
    """(outcomes and their weights, conversations with distinct ids)."""
    weights = draw(st.dictionaries(st.text("abcxyz", min_size=1, max_size=5), st.floats(-10, 10), max_size=3))
    ids = draw(st.lists(TEXT, unique=True, max_size=4))
    names = ("business_id", "context", "policy_version", "arm", "persona")
    fields: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(dict.fromkeys(names, OPTIONAL_TEXT))
    talks = [Conversation(i, draw(turns(len(weights))), draw(TEXT), **draw(fields)) for i in ids]
    return weights, talks


@settings(deadline=None, max_examples=50)
@given(tables())
def test_frame_and_back_is_the_identity(table: tuple[dict[str, float], list[Conversation]]) -> None:
    weights, talks = table
    assert list(conversations(to_frame(talks, weights, 0.3))) == talks


@settings(deadline=None, max_examples=40)
@given(tables())
def test_parquet_and_back_is_the_identity(table: tuple[dict[str, float], list[Conversation]]) -> None:
    """Conversation -> frame -> Parquet -> frame -> Conversation; the file is in the order of the ids."""
    weights, talks = table
    frame = to_frame(talks, weights, 0.3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turns.parquet"
        turn_table.write(frame, path, weights)
        again = turn_table.read(path, weights)
        turn_table.write(again, path, weights)
        pd.testing.assert_frame_equal(turn_table.read(path, weights), again)
    assert list(conversations(again)) == sorted(talks, key=lambda talk: talk.conversation_id)
    assert again.dtypes.equals(frame.dtypes)


@settings(deadline=None, max_examples=25)
@given(tables())
def test_rows_carry_number_weighted_outcome_part_and_last_mark(
    table: tuple[dict[str, float], list[Conversation]],
) -> None:
    weights, talks = table
    frame = to_frame(talks, weights, 0.3)
    expected = [(n, turn, talk) for talk in talks for n, turn in enumerate(talk.turns, start=1)]
    assert frame["turn"].tolist() == [n for n, _, _ in expected]
    total = [math.fsum(w * o for w, o in zip(weights.values(), turn.outcomes, strict=True)) for _, turn, _ in expected]
    assert np.allclose(frame["outcome"], total, rtol=1e-9, atol=1e-3)
    assert frame["part"].tolist() == [part_of(talk.customer_id, 0.3) for _, _, talk in expected]
    assert last_rows(frame).tolist() == [n == len(talk.turns) for n, _, talk in expected]
    trainable = [t.suggestion is not None and t.suggestion.status != "missing" for _, t, _ in expected]
    assert actions(frame).tolist() == trainable


# --- what a reader may rely on ---------------------------------------------------------------------------------------


def talk(name: str = "t1", customer: str = "u1", **fields: Any) -> Conversation:
    """A short conversation with a suggestion, an abstention and a sale."""
    acted = (
        Turn(
            "hi",
            (0.0, 0.0),
            Suggestion("hello", "suggested", -1.5),
            "hello!",
            "edited",
            datetime(2025, 1, 2, tzinfo=UTC),
        ),
        Turn("", (0.0, 0.0), ABSTAIN, "", None),
    )
    return Conversation(name, (*acted, Turn("I take it", (1.0, 1.0))), customer, **fields)


FRAME = to_frame([talk("t1"), talk("t2", "u2")], OUTCOMES, 0.2)


def test_null_and_the_empty_message_are_two_things(tmp_path: Path) -> None:
    """Null: absent. "": a message without text. Abstained: suggested nothing. Missing: never logged."""
    acted = (Turn("", (), ABSTAIN, None), Turn("c", (), MISSING, ""))
    told = Conversation("t", (*acted, Turn(None)), "u", business_id="", context=None)
    turn_table.write(to_frame([told], {}, 0.2), tmp_path / "t.parquet", {})
    frame = turn_table.read(tmp_path / "t.parquet", {})
    assert list(conversations(frame)) == [told]
    assert frame["suggestion_status"].tolist()[:2] == ["abstained", "missing"]
    assert frame["suggestion"].isna().tolist() == [False, True, True]
    assert frame["business_message"].isna().tolist() == [True, False, True]


def test_times_are_kept_as_moments_in_utc() -> None:
    summer = datetime(2025, 7, 1, 12, 0, 0, 123456, tzinfo=timezone(timedelta(hours=2)))
    told = Conversation("t", (Turn("c", (), ABSTAIN, "m", None, summer), Turn(None)), "u")
    (again,) = conversations(to_frame([told], {}, 0.2))
    assert again.turns[0].timestamp == summer and again.turns[0].timestamp.utcoffset() == timedelta(0)


def test_a_state_is_what_was_said_before() -> None:
    told = talk(context="a kitchen")
    state = told.state(1)
    assert (state.history, state.customer_message, state.context) == (told.turns[:1], "", "a kitchen")
    for i in (2, 3):
        with pytest.raises(IndexError):
            told.state(i)


def test_files_below_a_folder_are_read_in_name_order(tmp_path: Path) -> None:
    turn_table.write(to_frame([talk("z")], OUTCOMES, 0.2), tmp_path / "a" / "1.parquet", OUTCOMES)
    turn_table.write(to_frame([talk("b")], OUTCOMES, 0.2), tmp_path / "b" / "0.parquet", OUTCOMES)
    frame = turn_table.read(tmp_path, OUTCOMES)
    assert [t.conversation_id for t in conversations(frame)] == ["z", "b"]
    assert frame.index.tolist() == list(range(6))


@pytest.mark.parametrize("block", [1, 2, 3, 7, 100])
def test_conversations_are_whole_whatever_the_block_of_rows(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    acted = [[Turn(f"{k} {i}", (), ABSTAIN) for i in range(k % 4)] for k in range(9)]
    talks = [Conversation(f"c{k}", (*said, Turn("bye")), f"u{k}") for k, said in enumerate(acted)]
    frame = to_frame(talks, {}, 0.2)
    monkeypatch.setattr(turn_table, "BLOCK_ROWS", block)
    sizes = list[int]()
    values = turn_table._python_values
    monkeypatch.setattr(turn_table, "_python_values", lambda column: (sizes.append(len(column)), values(column))[1])
    assert list(conversations(frame)) == talks
    assert max(sizes[1:]) <= block + 3, "at most a conversation more than a block at a time"
    assert list(conversations(frame.iloc[:0])) == []


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 10_000])
def test_blocks_are_the_table_in_whole_conversations(rows: int, tmp_path: Path) -> None:
    """Whatever their size, over several files, one of them empty."""
    said = Turn("Hello", (0.0, 0.0), Suggestion("Hi", "suggested", -1.0), "Hi", "verbatim")
    talks = [Conversation(f"c{k:02}", (*[said] * (k % 4), Turn(None, (1.0, 0.0))), "u") for k in range(12)]
    for name, part in (("a", talks[:5]), ("b", []), ("c", talks[5:])):
        turn_table.write(to_frame(part, OUTCOMES, 0.3), tmp_path / f"{name}.parquet", OUTCOMES)
    whole, parts = turn_table.read(tmp_path, OUTCOMES), list(turn_table.blocks(tmp_path, OUTCOMES, rows))
    pd.testing.assert_frame_equal(pd.concat(parts, ignore_index=True), whole)
    assert sum(part["conversation_id"].nunique() for part in parts) == 12
    assert all(part.index.equals(pd.RangeIndex(len(part))) for part in parts)
    assert turn_table.count_rows(tmp_path) == len(whole)
    assert len(parts) == {1: 12, 10_000: 3}.get(rows, len(parts))


def test_blocks_of_a_table_without_rows_are_one_without_rows(tmp_path: Path) -> None:
    turn_table.write(to_frame([], OUTCOMES, 0.3), tmp_path / "a.parquet", OUTCOMES)
    (only,) = turn_table.blocks(tmp_path / "a.parquet", OUTCOMES)
    pd.testing.assert_frame_equal(only, turn_table.read(tmp_path / "a.parquet", OUTCOMES))


def test_rows_are_sorted_when_written(tmp_path: Path) -> None:
    turn_table.write(FRAME.iloc[::-1], tmp_path / "t.parquet", OUTCOMES)
    pd.testing.assert_frame_equal(turn_table.read(tmp_path / "t.parquet", OUTCOMES), FRAME)


def test_what_a_killed_writer_left_behind_is_not_read(tmp_path: Path) -> None:
    """`whole_directory` drafts in a hidden folder beside the target; a kill leaves that folder there."""
    turn_table.write(FRAME, tmp_path / "round_0" / "t.parquet", OUTCOMES)
    turn_table.write(FRAME, tmp_path / ".round_1.abc" / "t.parquet", OUTCOMES)
    pd.testing.assert_frame_equal(turn_table.read(tmp_path, OUTCOMES), FRAME)


# --- what is refused -------------------------------------------------------------------------------------------------

NON_NULL = ["conversation_id", "turn", "customer_id", "outcome", "outcome_purchase", "outcome_contact", "part"]


@pytest.mark.parametrize("column", FRAME.columns.drop(ORIGIN))
def test_a_missing_column_is_named_with_its_nearest_neighbour(column: str) -> None:
    with pytest.raises(TurnTableError, match=rf"column '{column}' is missing; found"):
        conform(FRAME.drop(columns=column), OUTCOMES)
    with pytest.raises(TurnTableError, match=rf"column '{column}' is missing \(did you mean '{column[:-1]}'\?\)"):
        conform(FRAME.rename(columns={column: column[:-1]}), OUTCOMES)


WRONG: list[tuple[str, list[Any]]] = [
    ("conversation_id", [1, 2, 3, 4, 5, 6]),
    ("turn", ["one"] * 6),
    ("turn", [1.5] * 6),
    ("turn", [2**40] * 6),
    ("customer_message", [{"text": "hi"}] * 6),
    ("customer_message", [b"\xff"] * 6),
    ("customer_message", ["\ud800"] * 6),
    ("outcome", ["much"] * 6),
    ("behaviour_logprob", ["-"] * 6),
    ("part", [True] * 6),
    ("timestamp", ["yesterday"] * 6),
    ("timestamp", [1.5] * 6),
]


@pytest.mark.parametrize(("column", "values"), WRONG, ids=[f"{c} {v[0]!a}" for c, v in WRONG])
def test_a_wrong_type_is_refused_by_column(column: str, values: list[Any]) -> None:
    with pytest.raises(TurnTableError, match=rf"column '{column}': expected"):
        conform(FRAME.assign(**{column: pd.Series(values, dtype=object)}), OUTCOMES)


def test_numbers_where_a_text_belongs_are_refused_whatever_the_dtype() -> None:
    for dtype in ("int64", "float64", "bool"):
        with pytest.raises(TurnTableError, match="column 'customer_id'"):
            conform(FRAME.assign(customer_id=pd.Series([1] * 6, dtype=dtype)), OUTCOMES)


def test_a_text_that_utf8_cannot_hold_is_refused_on_the_way_in() -> None:
    """Half of a surrogate pair, as JSON logs have them where an emoji was cut in two."""
    with pytest.raises(TurnTableError, match="customer_message"):
        to_frame([Conversation("t", (Turn("\ud83d", ()),), "u")], {}, 0.2)


def test_a_column_that_is_there_twice_is_refused() -> None:
    with pytest.raises(TurnTableError, match="turn"):
        conform(pd.concat([FRAME, FRAME[["turn"]]], axis=1), OUTCOMES)


def test_a_turn_with_another_number_of_outcomes_is_refused() -> None:
    with pytest.raises(TurnTableError, match=r"conversation t1, turn 1: 2 outcomes, expected 1 \(purchase\)"):
        to_frame([talk()], {"purchase": 1.0}, 0.2)


@pytest.mark.parametrize("column", NON_NULL)
def test_nulls_where_none_may_be_are_refused_and_no_file_is_left(tmp_path: Path, column: str) -> None:
    frame = FRAME.astype({column: object})
    frame.loc[1, column] = None
    with pytest.raises(TurnTableError, match=rf"'?{column}'?.*null"):
        turn_table.write(frame, tmp_path / "t.parquet", OUTCOMES)
    assert not list(tmp_path.iterdir())


def test_a_refused_table_leaves_the_one_before_it(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    turn_table.write(FRAME, path, OUTCOMES)
    with pytest.raises(TurnTableError):
        turn_table.write(FRAME.assign(outcome=np.nan), path, OUTCOMES)
    pd.testing.assert_frame_equal(turn_table.read(path, OUTCOMES), FRAME)


def by_blocks(path: Path, outcomes: dict[str, float]) -> pd.DataFrame:
    return pd.concat(turn_table.blocks(path, outcomes, 2), ignore_index=True)


both_ways = pytest.mark.parametrize("read", [turn_table.read, by_blocks])


@both_ways
def test_no_table_there(read: Read, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(StoreError, match="no turn table there"):
            read(path, OUTCOMES)


def written(path: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """A table that another program, or another version of this one, wrote."""
    turn_table.write(FRAME, path, OUTCOMES)
    pq.write_table(change(pq.read_table(path)), path)
    return path


def with_version(version: bytes) -> Callable[[pa.Table], pa.Table]:
    """Set the schema version in the file's metadata."""
    return lambda table: table.replace_schema_metadata({b"iterative_ppo_schema": version})


@both_ways
def test_a_newer_schema_is_refused_and_an_unmarked_one_read(read: Read, tmp_path: Path) -> None:
    newer = written(tmp_path / "t.parquet", with_version(str(SCHEMA_VERSION + 1).encode()))
    with pytest.raises(StoreError, match=rf"written with schema {SCHEMA_VERSION + 1}.*up to {SCHEMA_VERSION}"):
        read(newer, OUTCOMES)
    unmarked = written(tmp_path / "t.parquet", lambda table: table.replace_schema_metadata({}))
    pd.testing.assert_frame_equal(read(unmarked, OUTCOMES), FRAME)


@both_ways
def test_a_version_that_is_no_number_is_refused(read: Read, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="schema"):
        read(written(tmp_path / "t.parquet", with_version(b"latest")), OUTCOMES)


@both_ways
def test_a_file_without_a_column_is_named(read: Read, tmp_path: Path) -> None:
    path = written(tmp_path / "t.parquet", lambda table: table.drop_columns(["part"]))
    with pytest.raises(TurnTableError, match=r"t\.parquet: column 'part' is missing"):
        read(path, OUTCOMES)
    with pytest.raises(TurnTableError, match=r"'outcome_contat' is missing \(did you mean 'outcome_contact'\?\)"):
        read(written(path, lambda table: table), {"purchase": 1.0, "contat": 0.5})


@both_ways
def test_a_conversation_in_two_files_is_refused(read: Read, tmp_path: Path) -> None:
    turn_table.write(FRAME.iloc[:4], tmp_path / "a.parquet", OUTCOMES)
    turn_table.write(FRAME.iloc[4:], tmp_path / "b.parquet", OUTCOMES)
    with pytest.raises(TurnTableError, match=r"'t2' is in both .*a\.parquet and .*b\.parquet"):
        read(tmp_path, OUTCOMES)


def content() -> bytes:
    """The bytes of a written table."""
    with tempfile.TemporaryDirectory() as folder:
        turn_table.write(FRAME, Path(folder) / "t.parquet", OUTCOMES)
        return (Path(folder) / "t.parquet").read_bytes()


CONTENT = content()


@settings(deadline=None, max_examples=60)
@given(st.integers(0, len(CONTENT) - 1))
def test_a_file_cut_short_is_refused(length: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        path.write_bytes(CONTENT[:length])
        for read in (turn_table.read, by_blocks):
            with pytest.raises(StoreError, match=r"t\.parquet: not a readable Parquet file"):
                read(path, OUTCOMES)


@settings(deadline=None, max_examples=120)
@given(st.integers(4, len(CONTENT) - 9), st.integers(1, 255))
def test_a_flipped_byte_never_changes_a_table_silently(place: int, flip: int) -> None:
    """Either the named error or the same rows (a byte that holds statistics, say)."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.parquet"
        path.write_bytes(CONTENT[:place] + bytes([CONTENT[place] ^ flip]) + CONTENT[place + 1 :])
        try:
            pd.testing.assert_frame_equal(turn_table.read(path, OUTCOMES), FRAME)
        except (StoreError, TurnTableError) as error:
            assert "t.parquet" in str(error)


# --- the part --------------------------------------------------------------------------------------------------------


@given(TEXT, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_part_is_stable_and_grows_with_the_share(unit: str, one: float, two: float) -> None:
    low, high = sorted((one, two))
    assert part_of(unit, low) == part_of(unit, low) in PARTS
    assert part_of(unit, 0.0) == "fit" and part_of(unit, 1.0) == "evidence"
    if part_of(unit, low) == "evidence":
        assert part_of(unit, high) == "evidence"


def test_parts_are_the_same_in_every_process_and_release() -> None:
    """Golden: a customer who changed parts would leak evidence into the fit."""
    assert [part_of(f"customer {n}", 0.3) for n in range(8)] == GOLDEN_PARTS


GOLDEN_PARTS = ["fit", "fit", "evidence", "fit", "fit", "evidence", "fit", "fit"]


@pytest.mark.parametrize("share", [0.05, 0.15, 0.5])
def test_the_share_of_evidence_is_the_one_asked_for(share: float) -> None:
    units = 20_000
    found = np.mean([part_of(f"customer-{n}", share) == "evidence" for n in range(units)])
    assert abs(found - share) <= 3 * math.sqrt(share * (1 - share) / units)


def test_the_part_goes_by_customer_or_by_business() -> None:
    talks = [talk(f"t{n}", f"u{n}", business_id=f"b{n % 2}" if n % 3 else None) for n in range(60)]
    customers, businesses = (to_frame(talks, OUTCOMES, 0.5, split_by=unit) for unit in ("customer", "business"))
    assert customers["part"].tolist()[::3] == [part_of(t.customer_id, 0.5) for t in talks]
    assert businesses["part"].tolist()[::3] == [part_of(t.business_id or t.customer_id, 0.5) for t in talks]
    assert (customers.groupby("conversation_id")["part"].nunique() == 1).all()
