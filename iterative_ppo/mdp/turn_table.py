"""The turn table: one row a turn, one Arrow/Parquet schema, a conversation never split over two files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from iterative_ppo.errors import StoreError, TurnTableError, did_you_mean
from iterative_ppo.files import write_bytes
from iterative_ppo.mdp.conversation import REPORTED, Conversation, Part, Suggestion, Turn, part_of

SCHEMA_VERSION = 1
BLOCK_ROWS = 4096
"""Rows that become Python objects at a time, at least."""
READ_ROWS = 4 * BLOCK_ROWS
"""Rows that are read from a file at a time, and written to it as a group."""
OUTCOME_PREFIX = "outcome_"
ORIGIN = "outcome_origin"

_BEFORE = [
    ("conversation_id", pa.string(), False),
    ("turn", pa.int32(), False),
    ("customer_id", pa.string(), False),
    ("business_id", pa.string(), True),
    ("context", pa.string(), True),
    ("customer_message", pa.string(), True),
    ("outcome", pa.float64(), False),
]
_AFTER = [
    (ORIGIN, pa.string(), True),
    ("suggestion", pa.string(), True),
    ("suggestion_status", pa.string(), True),
    ("business_message", pa.string(), True),
    ("adoption", pa.string(), True),
    ("behaviour_logprob", pa.float64(), True),
    ("policy_version", pa.string(), True),
    ("arm", pa.string(), True),
    ("persona", pa.string(), True),
    ("part", pa.string(), False),
    ("timestamp", pa.timestamp("us", tz="UTC"), True),
]


def outcome_columns(outcomes: Iterable[str]) -> list[str]:
    """Column names of the named outcomes: `outcome_purchase` for `purchase`."""
    return [f"{OUTCOME_PREFIX}{name}" for name in outcomes]


def named_columns(frame: pd.DataFrame) -> list[str]:
    """The columns of a table's named outcomes."""
    return [str(c) for c in frame.columns if str(c).startswith(OUTCOME_PREFIX) and c != ORIGIN]


def turn_schema(outcomes: Mapping[str, float]) -> pa.Schema:
    """The Arrow schema. `outcomes` maps each named outcome to its weight in R, which column `outcome` holds."""
    named = [(column, pa.float64(), False) for column in outcome_columns(outcomes)]
    fields = [pa.field(name, kind, nullable=null) for name, kind, null in [*_BEFORE, *named, *_AFTER]]
    metadata = {"iterative_ppo_schema": str(SCHEMA_VERSION), "outcome_weights": json.dumps(dict(outcomes))}
    return pa.schema(fields, metadata=metadata)


def to_frame(
    conversations: Iterable[Conversation],
    outcomes: Mapping[str, float],
    evidence_share: float,
    split_by: str = "customer",
) -> pd.DataFrame:
    """Conversations as turn-table rows.

    `split_by` names the id ("customer" or "business") whose hash decides the data part. Raises TurnTableError where a
    turn has another number of outcomes than `outcomes` names.
    """
    weights = np.array(list(outcomes.values()))
    rows: list[tuple[Any, ...]] = []
    for talk in conversations:
        part = part_of_conversation(talk, evidence_share, split_by)
        for number, turn in enumerate(talk.turns, start=1):
            if len(turn.outcomes) != len(weights):
                raise TurnTableError(
                    f"conversation {talk.conversation_id}, turn {number}: {len(turn.outcomes)} outcomes, expected "
                    f"{len(weights)} ({', '.join(outcomes)})"
                )
            action = turn.suggestion
            rows.append(
                (
                    talk.conversation_id,
                    number,
                    talk.customer_id,
                    talk.business_id,
                    talk.context,
                    turn.customer_message,
                    float(np.dot(weights, turn.outcomes)),
                    *turn.outcomes,
                    talk.outcome_origin,
                    action.text if action else None,
                    action.status if action else None,
                    turn.business_message,
                    turn.adoption,
                    action.logprob if action else None,
                    talk.policy_version,
                    talk.arm,
                    talk.persona,
                    part,
                    turn.timestamp,
                )
            )
    return conform(pd.DataFrame(rows, columns=turn_schema(outcomes).names, dtype=object), outcomes)


def part_of_conversation(talk: Conversation, evidence_share: float, split_by: str) -> Part:
    """The data part of a conversation, by the id that `split_by` names; its customer stands in for no business."""
    unit = talk.customer_id if split_by == "customer" else talk.business_id or talk.customer_id
    return part_of(unit, evidence_share)


def conform(frame: pd.DataFrame, outcomes: Mapping[str, float]) -> pd.DataFrame:
    """Cast a frame to the schema's columns, order and types (a round trip through Arrow).

    A table without outcome_origin is one of reported outcomes.

    Raises TurnTableError, naming the column (and its nearest known name), where one is missing or does not cast.
    """
    schema = turn_schema(outcomes)
    if ORIGIN not in frame.columns:
        frame = frame.assign(**{ORIGIN: REPORTED})
    for name in schema.names:
        if name not in frame.columns:
            extra = [c for c in frame.columns if c not in schema.names]
            raise TurnTableError(f"column {name!r} is missing{did_you_mean(name, extra)}; found {list(frame.columns)}")
        if isinstance(frame[name], pd.DataFrame):
            raise TurnTableError(f"column {name!r} is there {frame[name].shape[1]} times, expected once")
    nullable = pa.schema([field.with_nullable(True) for field in schema], metadata=schema.metadata)
    columns = []
    for field in nullable:
        try:
            columns.append(pa.Array.from_pandas(frame[field.name].infer_objects(), type=field.type, safe=True))
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise TurnTableError(f"column {field.name!r}: expected {field.type}, {error}") from None
    return _to_pandas(pa.Table.from_arrays(columns, schema=nullable))


def _to_pandas(table: pa.Table) -> pd.DataFrame:
    frame = table.to_pandas(types_mapper={pa.string(): pd.StringDtype("pyarrow", na_value=pd.NA)}.get)
    return frame.reset_index(drop=True)


def write(frame: pd.DataFrame, path: Path, outcomes: Mapping[str, float]) -> None:
    """Write rows, sorted by conversation and turn, to one Parquet file, atomically.

    Raises TurnTableError where a non-null column holds a null: such rows belong in quarantine, not in the table.
    """
    schema = turn_schema(outcomes)
    ordered = conform(frame, outcomes).sort_values(["conversation_id", "turn"], kind="stable", ignore_index=True)
    for field in schema:
        if not field.nullable and ordered[field.name].isna().any():
            raise TurnTableError(f"{path}: column {field.name!r} holds nulls; quarantine those conversations first")
    table = pa.Table.from_pandas(ordered, schema=schema, preserve_index=False).replace_schema_metadata(schema.metadata)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=READ_ROWS, compression="zstd", write_page_checksum=True)
    write_bytes(path, sink.getvalue().to_pybytes())


def read(path: Path, outcomes: Mapping[str, float]) -> pd.DataFrame:
    """Read a file, or all Parquet files below a directory, in name order.

    Raises StoreError where there is none, it is damaged, or a newer version of this program wrote it; TurnTableError
    where a column is missing or a conversation is split over two files.
    """
    frames = list(_frames(path, outcomes))
    return pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]


def blocks(path: Path, outcomes: Mapping[str, float], rows: int = READ_ROWS) -> Iterator[pd.DataFrame]:
    """What `read` reads, about `rows` rows at a time, so that a table may be larger than memory.

    Each block is of whole conversations: rows of a conversation must be adjacent. There is one block at least, empty
    where the table is. Raises what `read` raises, where it comes to it.
    """
    rest = conform(turn_schema(outcomes).empty_table().to_pandas(), outcomes)
    for frame in _frames(path, outcomes, rows):
        held = pd.concat([rest, frame], ignore_index=True) if len(rest) else frame
        conversation = pd.factorize(held["conversation_id"])[0]
        before_last = np.flatnonzero(conversation != conversation[-1]) if len(held) else np.zeros(0, int)
        start = int(before_last[-1]) + 1 if len(before_last) else 0
        if start:
            yield held[:start]
        rest = held[start:].reset_index(drop=True)
    yield rest


def count_rows(path: Path) -> int:
    """How many rows `read` would read, by what the files say of themselves."""
    return sum(pq.read_metadata(file).num_rows for file in _files(path))


def _files(path: Path) -> list[Path]:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*.parquet") if not _hidden(f, path))
    if not files:
        raise StoreError(f"{path}: no turn table there (expected a Parquet file or a folder of them)")
    return files


def _frames(path: Path, outcomes: Mapping[str, float], rows: int | None = None) -> Iterator[pd.DataFrame]:
    """Rows of a file, or of all below a directory: so many at a time (None: a file), an empty frame of an empty one."""
    files = _files(path)
    seen: dict[str, Path] = {}
    for file in files:
        for frame in _read_one(file, outcomes, rows):
            for conversation_id in frame["conversation_id"].dropna().unique() if len(files) > 1 else ():
                if seen.setdefault(conversation_id, file) != file:
                    raise TurnTableError(
                        f"conversation {conversation_id!r} is in both {seen[conversation_id]} and {file}"
                    )
            yield frame


def _hidden(file: Path, root: Path) -> bool:
    """Below a dot folder: a draft that a killed run left."""
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read_one(file: Path, outcomes: Mapping[str, float], rows: int | None) -> Iterator[pd.DataFrame]:
    for table in _tables(file, rows):
        version = (table.schema.metadata or {}).get(b"iterative_ppo_schema", b"0").decode(errors="replace")
        if not version.isdecimal() or int(version) > SCHEMA_VERSION:
            raise StoreError(
                f"{file}: written with schema {version}, this program knows up to {SCHEMA_VERSION}; install a newer one"
            )
        try:
            frame = _to_pandas(table)
        except (pa.ArrowException, ValueError, KeyError) as error:
            raise _unreadable(file, error) from None
        try:
            yield conform(frame, outcomes)
        except TurnTableError as error:
            raise TurnTableError(f"{file}: {error}") from None


def check_file(file: Path) -> None:
    """Read a Parquet file to its end, a block at a time, whatever is in it. Raises StoreError where it is damaged."""
    for _ in _tables(file, BLOCK_ROWS):
        pass


def _tables(file: Path, rows: int | None) -> Iterator[pa.Table]:
    try:
        if rows is None:
            yield pq.read_table(file, partitioning=None, page_checksum_verification=True)
            return
        with pq.ParquetFile(file, page_checksum_verification=True) as source:
            if not source.metadata.num_rows:
                yield source.schema_arrow.empty_table()
            for batch in source.iter_batches(rows):
                yield pa.Table.from_batches([batch], source.schema_arrow)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _unreadable(file, error) from None


def _unreadable(file: Path, error: Exception) -> StoreError:
    return StoreError(f"{file}: not a readable Parquet file ({error})")


def ids_in(file: Path) -> set[str]:
    """Ids of a file's conversations. Raises StoreError where it is damaged or has none."""
    try:
        table = pq.read_table(file, columns=["conversation_id"], partitioning=None)
        return set(table["conversation_id"].cast(pa.string()).drop_null().to_pylist())
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise _unreadable(file, error) from None


def conversations(frame: pd.DataFrame) -> Iterator[Conversation]:
    """The rows as Conversation objects, in table order. Rows of a conversation must be adjacent and in order.

    Only a block of rows at a time becomes Python objects, which take several times the memory of the table.
    """
    ids = np.array([*_python_values(frame["conversation_id"]), None], dtype=object)
    ends = np.append(np.flatnonzero(ids[1:-1] != ids[:-2]) + 1, len(frame))
    start = 0
    while start < len(frame):
        stop = int(ends[min(int(np.searchsorted(ends, start + BLOCK_ROWS)), len(ends) - 1)])
        yield from _block(frame.iloc[start:stop])
        start = stop


def _block(frame: pd.DataFrame) -> Iterator[Conversation]:
    names = named_columns(frame)
    columns = {c: _python_values(frame[c]) for c in frame.columns}
    ids = columns["conversation_id"]
    start = 0
    for end in range(1, len(ids) + 1):
        if end < len(ids) and ids[end] == ids[start]:
            continue
        turns = tuple(_turn(columns, names, row) for row in range(start, end))
        first = {name: columns[name][start] for name in _CONVERSATION_COLUMNS}
        yield Conversation(turns=turns, **first)
        start = end


_CONVERSATION_COLUMNS = (
    "conversation_id",
    "customer_id",
    "business_id",
    "context",
    "policy_version",
    "arm",
    "persona",
    ORIGIN,
)


def _python_values(column: pd.Series) -> list[Any]:
    values: list[Any] = column.astype(object).where(column.notna(), None).tolist()
    return values


def _turn(columns: Mapping[str, Sequence[Any]], names: Sequence[str], row: int) -> Turn:
    status = columns["suggestion_status"][row]
    action = Suggestion(columns["suggestion"][row], status, columns["behaviour_logprob"][row]) if status else None
    stamp = columns["timestamp"][row]
    return Turn(
        customer_message=columns["customer_message"][row],
        outcomes=tuple(columns[name][row] for name in names),
        suggestion=action,
        business_message=columns["business_message"][row],
        adoption=columns["adoption"][row],
        timestamp=stamp.to_pydatetime().astimezone(UTC) if isinstance(stamp, pd.Timestamp) else None,
    )


_FACTS = ("conversation_id", "turn", "outcome", "suggestion_status", "behaviour_logprob", "part")


def facts(frame: pd.DataFrame) -> pd.DataFrame:
    """The table without what was said and by whom: whose turn it is, how it ended, what may be learnt from it."""
    return frame[[c for c in frame.columns if c in _FACTS or c.startswith(OUTCOME_PREFIX)]]


def actions(frame: pd.DataFrame) -> np.ndarray:
    """(N,) bool: rows whose suggestion may train Q and the policy (suggested or abstained)."""
    return frame["suggestion_status"].isin(["suggested", "abstained"]).to_numpy()


def last_rows(frame: pd.DataFrame) -> np.ndarray:
    """(N,) bool: the last row of each conversation, for a frame sorted by conversation and turn."""
    ids = frame["conversation_id"].to_numpy(dtype=object)
    return np.append(ids[1:] != ids[:-1], True) if len(ids) else np.zeros(0, bool)


def conversation_numbers(last: np.ndarray) -> np.ndarray:
    """(N,) 0 to C - 1: which conversation each row is of, given `last` (N,) bool, their last rows."""
    numbers: np.ndarray = np.cumsum(last) - last
    return numbers
