"""Token sequences that a table may have more of than memory holds: in a file, and as views of others."""

from __future__ import annotations

import os
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, overload

import numpy as np

from iterative_ppo.errors import StoreError
from iterative_ppo.mdp.rendering import Encoded, Span, single

Item = TypeVar("Item")
Prompts = Sequence[tuple[int, ...]]

_WIDTH = np.dtype(np.int32).itemsize
_SPAN = 4
"""Numbers of a span in the file: row, start, end, trains."""


def lengths_of(sequences: Sequence[Encoded]) -> np.ndarray:
    """(S,) tokens of each sequence."""
    if isinstance(sequences, SequenceFile | Chosen | Joined | Answered):
        return sequences.lengths
    return np.array([len(sequence.tokens) for sequence in sequences], dtype=np.int64)


def prompt_lengths(prompts: Prompts) -> np.ndarray:
    """(N,) tokens of each prompt; those that lie in a file are not read for it."""
    if isinstance(prompts, Beginnings):
        return prompts.lengths
    return np.array([len(prompt) for prompt in prompts], dtype=np.int64)


def portions(
    order: Sequence[int], lengths: Sequence[int], tokens: int, places: int | None = None
) -> Iterator[Sequence[int]]:
    """Places in their order, longest first, in portions of at most about `tokens` padded tokens; one place at least.

    Args:
        places: no more of them in a portion; None means as many as there is room for.
    """
    begin = 0
    while begin < len(order):
        room = tokens // max(1, lengths[order[begin]])
        size = max(1, room if places is None else min(room, places))
        yield order[begin : begin + size]
        begin += size


class _OneByOne(Sequence[Item]):
    """A sequence that only knows how to get its k-th element."""

    @abstractmethod
    def at(self, k: int) -> Item:
        """The k-th, 0 <= k < len."""

    @overload
    def __getitem__(self, k: int) -> Item: ...
    @overload
    def __getitem__(self, k: slice) -> list[Item]: ...
    def __getitem__(self, k: int | slice) -> Item | list[Item]:
        if isinstance(k, slice):
            return [self.at(i) for i in range(*k.indices(len(self)))]
        if not -len(self) <= k < len(self):
            raise IndexError(k)
        return self.at(int(k) % len(self))


class SequenceFile(_OneByOne[Encoded]):
    """Sequences in a file of 32-bit integers, each read when it is asked for: memory holds 20 bytes a sequence.

    Another process may have it by pickle, which holds the path. Whoever made the file removes it.
    """

    def __init__(self, path: Path, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.path, self._starts, self.lengths = path, starts, lengths

    @classmethod
    def write(cls, path: Path, sequences: Iterable[Encoded]) -> SequenceFile:
        """Write sequences as they come. Rows and positions of their spans must be below 2^31."""
        sizes, lengths = [0], list[int]()
        with path.open("wb") as file:
            for sequence in sequences:
                spans = [n for s in sequence.spans for n in (s.row, s.start, s.end, s.trains)]
                file.write(np.array([*sequence.tokens, *spans], dtype=np.int32).tobytes())
                sizes.append(len(sequence.tokens) + len(spans))
                lengths.append(len(sequence.tokens))
        return cls(path, np.cumsum(sizes), np.array(lengths, dtype=np.int32))

    @cached_property
    def _file(self) -> BinaryIO:
        return self.path.open("rb")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_file"}

    def __len__(self) -> int:
        return len(self.lengths)

    def at(self, k: int) -> Encoded:
        """Raises StoreError where the file was cut short since it was written."""
        start, end, length = int(self._starts[k]), int(self._starts[k + 1]), int(self.lengths[k])
        content = os.pread(self._file.fileno(), _WIDTH * (end - start), _WIDTH * start)
        if len(content) < _WIDTH * (end - start):
            raise StoreError(f"{self.path}: ends within sequence {k}; is the disk full?")
        numbers = np.frombuffer(content, dtype=np.int32).tolist()
        spans = (numbers[i : i + _SPAN] for i in range(length, len(numbers), _SPAN))
        return Encoded(tuple(numbers[:length]), tuple(Span(row, a, b, bool(trains)) for row, a, b, trains in spans))


@dataclass(frozen=True)
class Chosen(_OneByOne[Encoded]):
    """Some of other sequences: those at `places` (S,)."""

    sequences: Sequence[Encoded]
    places: np.ndarray

    @cached_property
    def lengths(self) -> np.ndarray:
        return lengths_of(self.sequences)[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def at(self, k: int) -> Encoded:
        return self.sequences[int(self.places[k])]


@dataclass(frozen=True)
class Joined(_OneByOne[Encoded]):
    """The sequences of several tables, one after the other, as of one table: `rows` (P,) is the length of each."""

    parts: Sequence[Sequence[Encoded]]
    rows: Sequence[int]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(len(part) for part in self.parts)]

    @cached_property
    def _offsets(self) -> list[int]:
        return [0, *accumulate(self.rows)]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.concatenate([lengths_of(part) for part in self.parts])

    def __len__(self) -> int:
        return self._starts[-1]

    def at(self, k: int) -> Encoded:
        part = bisect_right(self._starts, k) - 1
        found = self.parts[part][k - self._starts[part]]
        if not (offset := self._offsets[part]):
            return found
        return Encoded(found.tokens, tuple(replace(span, row=span.row + offset) for span in found.spans))


@dataclass(frozen=True)
class Beginnings(_OneByOne[tuple[int, ...]]):
    """Prompts that are the beginnings of sequences: the first `lengths` (N,) tokens of those at `places` (N,)."""

    sequences: Sequence[Encoded]
    places: np.ndarray
    lengths: np.ndarray

    @classmethod
    def whole(cls, path: Path, prompts: Iterable[tuple[int, ...]]) -> Beginnings:
        """Prompts in a file of their own, made here (SequenceFile)."""
        file = SequenceFile.write(path, (Encoded(prompt, ()) for prompt in prompts))
        return cls(file, np.arange(len(file)), file.lengths)

    def __len__(self) -> int:
        return len(self.places)

    def at(self, k: int) -> tuple[int, ...]:
        return self.sequences[int(self.places[k])].tokens[: self.lengths[k]]


def some_of(prompts: Prompts, count: int | None, rng: np.random.Generator) -> Prompts:
    """At most so many of the prompts, drawn at random and in their order; those that lie in a file stay there."""
    if count is None or len(prompts) <= count:
        return prompts
    places = np.sort(rng.choice(len(prompts), count, replace=False))
    if isinstance(prompts, Beginnings):
        return Beginnings(prompts.sequences, prompts.places[places], prompts.lengths[places])
    return [prompts[int(k)] for k in places]


@dataclass(frozen=True)
class Answered(_OneByOne[Encoded]):
    """Prompts, each with a response that trains, as sequences of one turn; the k-th is of row k."""

    prompts: Prompts
    responses: Sequence[tuple[int, ...]]

    @cached_property
    def lengths(self) -> np.ndarray:
        return prompt_lengths(self.prompts) + prompt_lengths(self.responses)

    def __len__(self) -> int:
        return len(self.responses)

    def at(self, k: int) -> Encoded:
        return single(k, self.prompts[k], self.responses[k], True)
