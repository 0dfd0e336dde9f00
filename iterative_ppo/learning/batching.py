"""Token sequences as padded batches: shuffled, near in length, each sequence paying about its own length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from iterative_ppo.learning.sequences import SequenceFile, lengths_of, portions
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.rendering import Encoded, Renderer, Span


@dataclass(frozen=True)
class EncodedTable:
    """A turn table as token sequences. `rows` is the table's length: spans name rows of it."""

    sequences: Sequence[Encoded]
    rows: int
    truncated_turns: int = 0
    unshared: int = field(default=0)

    @property
    def tokens(self) -> int:
        return int(lengths_of(self.sequences).sum())


def encode_table(frame: pd.DataFrame, renderer: Renderer) -> EncodedTable:
    """Encode every conversation of a turn table (sorted by conversation and turn)."""
    return encode(turn_table.conversations(frame), renderer)


def encode(talks: Iterable[Conversation], renderer: Renderer, place: Path | None = None) -> EncodedTable:
    """Encode the conversations of a turn table as they come; into a file at `place`, where that is given."""
    row = truncated = unshared = 0

    def sequences() -> Iterator[Encoded]:
        nonlocal row, truncated, unshared
        for talk in talks:
            encoded, cut = renderer.encode(talk, row)
            row += len(talk.turns)
            truncated += cut
            unshared += len(encoded) > 1
            yield from encoded

    kept = list(sequences()) if place is None else SequenceFile.write(place, sequences())
    return EncodedTable(kept, row, truncated, unshared)


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences and flat indices of their spans.

    tokens (B, T); for the S spans of the batch: sequence (S,), start (S,), end (S,), row (S,), trains (S,).
    """

    tokens: torch.Tensor
    sequence: np.ndarray
    start: np.ndarray
    end: np.ndarray
    row: np.ndarray
    trains: np.ndarray


def collate(sequences: Sequence[Encoded], pad: int) -> Batch:
    """Pad on the right, so that causal attention needs no mask for the real tokens."""
    width = max(len(sequence.tokens) for sequence in sequences)
    tokens = np.full((len(sequences), width), pad, dtype=np.int64)
    spans: list[tuple[int, Span]] = []
    for k, encoded in enumerate(sequences):
        tokens[k, : len(encoded.tokens)] = encoded.tokens
        spans += [(k, span) for span in encoded.spans]
    columns = np.array([(k, s.start, s.end, s.row, s.trains) for k, s in spans], dtype=np.int64).reshape(-1, 5)
    sequence, start, end, row, trains = columns.T
    return Batch(torch.from_numpy(tokens), sequence, start, end, row, trains.astype(bool))


def response_positions(batch: Batch, spans: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat positions of the spans' response tokens: (which span, sequence, position), each (N,)."""
    lengths = batch.end[spans] - batch.start[spans]
    span = np.repeat(spans, lengths)
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return span, batch.sequence[span], batch.start[span] + offset


def trained_turns(sequences: Sequence[Encoded], usable: np.ndarray) -> np.ndarray:
    """(S,) turns of each sequence whose action was logged and whose table row is `usable` (N,)."""
    return np.array([sum(x.trains and bool(usable[x.row]) for x in s.spans) for s in sequences], dtype=np.int64)


def training_batches(
    sequences: Sequence[Encoded], batch_size: int, epochs: float, pad: int, rng: np.random.Generator
) -> Iterator[Batch]:
    """`epochs` (also a fraction) of shuffled batches; neighbours in length share one, batches come in any order."""
    steps, lengths = step_count(len(sequences), batch_size, epochs), lengths_of(sequences)
    while steps > 0:
        for chosen in shuffled_batches(lengths, batch_size, rng):
            if steps == 0:
                return
            yield collate([sequences[i] for i in chosen], pad)
            steps -= 1


def step_count(sequences: int, batch_size: int, epochs: float) -> int:
    """Number of batches in `epochs` passes."""
    return math.ceil(epochs * math.ceil(sequences / batch_size)) if sequences else 0


def shuffled_batches(lengths: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Every index of `lengths` (N,) once, neighbours in length in one batch, the batches in any order.

    Batches that come by length, as those of transformers' `group_by_length`, teach long sequences and short ones by
    turns and cost a model much of what it could learn (docs/decisions.md).
    """
    order = rng.permutation(len(lengths))
    window = 16 * batch_size
    batches: list[np.ndarray] = []
    for begin in range(0, len(order), window):
        near = order[begin : begin + window]
        near = near[np.argsort(lengths[near], kind="stable")]
        batches += [near[i : i + batch_size] for i in range(0, len(near), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def inference_batches(sequences: Sequence[Encoded], tokens: int, pad: int) -> Iterator[Batch]:
    """All sequences once, longest first, at most about `tokens` padded tokens a batch."""
    lengths = lengths_of(sequences)
    order = np.argsort(-lengths, kind="stable")
    for chosen in portions(order.tolist(), lengths.tolist(), tokens):
        yield collate([sequences[i] for i in chosen], pad)
