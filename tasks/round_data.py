"""A round's conversations as learning sees them: tokens in a file, rewards and returns, read some at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from iterative_ppo.config import Config
from iterative_ppo.errors import SourceError
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from tasks.datasets import Dataset, of_policy

if TYPE_CHECKING:
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.policy_evaluation import Round


@contextmanager
def token_folder(draft: Path) -> Iterator[Path]:
    """For a block, a folder in a stage's draft for the token files of its rounds."""
    with TemporaryDirectory(dir=draft, prefix=".tokens-") as folder:
        yield Path(folder)


def champion_round(
    policy: LanguagePolicy, label: str, dataset: Dataset, config: Config, folder: Path
) -> tuple[Round, pd.DataFrame]:
    """The champion's own conversations of a dataset, what Monte Carlo returns may be taken from, and their facts.

    Args:
        folder: where the file of their tokens is made (token_folder); it is needed for as long as the round is.

    The second is the turn table without what was said (turn_table.facts). Raises SourceError where there is none.
    """
    facts: list[pd.DataFrame] = []

    def blocks() -> Iterator[pd.DataFrame]:
        for rows in _chosen(dataset, config, lambda block: of_policy(block, label)):
            facts.append(turn_table.facts(rows))
            yield rows

    data = _round(policy, blocks(), config, folder / f"own-{dataset.round_number}")
    if data is None:
        raise SourceError(f"{dataset.path}: holds no conversation of policy version {label}")
    return data, pd.concat(facts, ignore_index=True)


def other_rounds(policy: LanguagePolicy, label: str, dataset: Dataset, config: Config, folder: Path) -> Round | None:
    """Conversations of other policies: their turns serve one-step targets, whoever chose the action."""
    blocks = _chosen(dataset, config, lambda block: ~of_policy(block, label))
    return _round(policy, blocks, config, folder / f"others-{dataset.round_number}")


def earlier_round(policy: LanguagePolicy, label: str, dataset: Dataset, config: Config, folder: Path) -> Round | None:
    """The champion's own conversations of an earlier dataset, which are there where its challenger was rejected."""
    blocks = _chosen(dataset, config, lambda block: of_policy(block, label))
    data = _round(policy, blocks, config, folder / f"own-{dataset.round_number}")
    return None if data is None else replace(data, own=True)


def _chosen(dataset: Dataset, config: Config, wanted: Callable[[pd.DataFrame], pd.Series]) -> Iterator[pd.DataFrame]:
    for block in dataset.blocks(config):
        rows = block[wanted(block)].reset_index(drop=True)
        if len(rows):
            yield rows


def _round(policy: LanguagePolicy, blocks: Iterator[pd.DataFrame], config: Config, place: Path) -> Round | None:
    from iterative_ppo.learning.rounds import round_from

    first = next(blocks, None)
    return None if first is None else round_from(policy, chain([first], blocks), config, place)


def conversations_of(dataset: Dataset, config: Config, ids: list[str]) -> dict[str, Conversation]:
    """Some of a dataset's conversations, whole, by id."""
    kept = (block[block["conversation_id"].isin(ids)] for block in dataset.blocks(config))
    return {talk.conversation_id: talk for rows in kept for talk in turn_table.conversations(rows)}


def write_blocks(path: Path, blocks: Iterator[pd.DataFrame]) -> None:
    """Blocks of the same columns, one at least, as one Parquet file, so that only one is held at a time."""
    tables = (pa.Table.from_pandas(block, preserve_index=False) for block in blocks)
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as writer:
        for table in chain([first], tables):
            writer.write_table(table)


def write_prompts(path: Path, prompts: Sequence[tuple[int, ...]]) -> None:
    """Prompts as a Parquet file, a block at a time."""
    schema = pa.schema({"tokens": pa.list_(pa.int64())})
    with pq.ParquetWriter(path, schema) as writer:
        for begin in range(0, len(prompts), turn_table.BLOCK_ROWS):
            block = [list(prompt) for prompt in prompts[begin : begin + turn_table.BLOCK_ROWS]]
            writer.write_table(pa.table({"tokens": block}, schema))


def read_prompts(path: Path) -> Iterator[tuple[int, ...]]:
    """The prompts of such a file, one at a time."""
    with pq.ParquetFile(path) as source:
        for batch in source.iter_batches(turn_table.BLOCK_ROWS):
            yield from map(tuple, batch["tokens"].to_pylist())
