"""Token sequences in a file, and views of others: the same sequences, whatever holds them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterative_ppo.errors import StoreError
from iterative_ppo.learning import branching
from iterative_ppo.learning.sequences import (
    Answered,
    Beginnings,
    Chosen,
    Joined,
    SequenceFile,
    lengths_of,
    prompt_lengths,
    some_of,
)
from iterative_ppo.mdp.rendering import Encoded, Span, single

spans = st.builds(Span, st.integers(0, 2**31 - 1), st.integers(0, 500), st.integers(0, 500), st.booleans())
tables = st.lists(
    st.builds(
        Encoded, st.lists(st.integers(0, 2**31 - 1), max_size=9).map(tuple), st.lists(spans, max_size=3).map(tuple)
    ),
    max_size=6,
)


def some(count: int = 5) -> list[Encoded]:
    return [Encoded(tuple(range(k, 2 * k + 1)), (Span(k, 1, k + 1, k % 2 == 0),)) for k in range(1, count + 1)]


@given(tables)
def test_a_file_gives_back_what_was_written(tmp_path_factory: pytest.TempPathFactory, sequences: list[Encoded]) -> None:
    found = SequenceFile.write(tmp_path_factory.mktemp("tokens") / "tokens", iter(sequences))
    assert list(found) == sequences
    assert len(found) == len(sequences)
    assert lengths_of(found).tolist() == lengths_of(sequences).tolist() == [len(s.tokens) for s in sequences]


def test_one_may_be_asked_for_by_any_index(tmp_path: Path) -> None:
    sequences = some()
    for found in (SequenceFile.write(tmp_path / "tokens", sequences), Chosen(sequences, np.arange(5))):
        assert [found[k] for k in (3, -1, np.int64(0))] == [sequences[k] for k in (3, -1, 0)]
        assert found[1:4] == sequences[1:4]
        assert found[::-2] == sequences[::-2]
        for k in (5, -6):
            with pytest.raises(IndexError):
                found[k]


def test_another_process_has_it_by_its_path(tmp_path: Path) -> None:
    found = SequenceFile.write(tmp_path / "tokens", some(400))
    assert found[7] == some(400)[7]  # with the file open
    sent = pickle.dumps(found)
    assert len(sent) < (tmp_path / "tokens").stat().st_size / 10
    assert list(pickle.loads(sent)) == some(400)


def test_some_prompts_are_others_each_time_and_in_their_order(tmp_path: Path) -> None:
    prompts = [tuple(range(k, 2 * k)) for k in range(1, 41)]
    for every in (prompts, Beginnings.whole(tmp_path / "prompts", prompts)):
        few, again, others = (some_of(every, 10, np.random.default_rng(seed)) for seed in (0, 0, 1))
        assert list(few) == list(again) != list(others)
        assert list(few) == sorted(set(few)) and set(few) < set(prompts) and len(few) == 10
        assert prompt_lengths(few).tolist() == [len(prompt) for prompt in few]
        assert some_of(every, None, np.random.default_rng(0)) is some_of(every, 40, np.random.default_rng(0)) is every


def test_a_file_that_was_cut_short_is_told(tmp_path: Path) -> None:
    found = SequenceFile.write(tmp_path / "tokens", some())
    whole = (tmp_path / "tokens").read_bytes()
    (tmp_path / "tokens").write_bytes(whole[:-3])
    assert found[3] == some()[3]
    with pytest.raises(StoreError, match="ends within sequence 4"):
        found[4]


def test_views_are_the_sequences_that_they_name(tmp_path: Path) -> None:
    one, two = some(4), SequenceFile.write(tmp_path / "tokens", some(3))
    joined = Joined([one, two], [10, 7])
    moved = [Encoded(s.tokens, tuple(Span(x.row + 10, x.start, x.end, x.trains) for x in s.spans)) for s in some(3)]
    assert list(joined) == one + moved
    assert lengths_of(joined).tolist() == [len(s.tokens) for s in joined]
    chosen = Chosen(joined, np.array([5, 0, 5]))
    assert list(chosen) == [moved[1], one[0], moved[1]]
    assert lengths_of(chosen).tolist() == [len(s.tokens) for s in chosen]


def test_prompts_and_their_answers_are_views_too(tmp_path: Path) -> None:
    sequences = some(4)
    prompts = Beginnings(sequences, np.array([3, 0, 3]), np.array([2, 1, 0]))
    expected = [sequences[3].tokens[:2], sequences[0].tokens[:1], ()]
    assert list(prompts) == expected and prompts[1:] == expected[1:]
    stored = Beginnings.whole(tmp_path / "prompts", iter(expected))
    assert list(pickle.loads(pickle.dumps(stored))) == expected
    responses = [(7, 8), (), (9,)]
    answered = Answered(stored, responses)
    assert list(answered) == [single(k, expected[k], responses[k], True) for k in range(3)]
    assert lengths_of(answered).tolist() == [4, 1, 1]


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(1, 9)), max_size=12), st.integers(8, 60))
def test_neighbours_with_one_prompt_are_a_group_and_batches_keep_to_their_tokens(
    drawn: list[tuple[int, int, int]], tokens: int
) -> None:
    """Each sequence is in one group, with its own prompt; only a group of a single sequence may be too large."""
    sequences = [single(0, (kind,) * width, (7,) * length, True) for kind, width, length in drawn]
    found = branching.groups(sequences, tokens)
    assert [k for group in found for k in range(group.begin, group.end)] == list(range(len(sequences)))
    for group in found:
        mine = sequences[group.begin : group.end]
        assert {s.tokens[: s.spans[0].start] for s in mine} == {group.prompt}
        assert group.longest == max(s.spans[0].end - s.spans[0].start for s in mine)
        assert group.cost <= tokens or len(mine) == 1
    batches = list(branching.batches(found, tokens))
    assert sorted((g.begin, g.end) for batch in batches for g in batch) == [(g.begin, g.end) for g in found]
    for batch in batches:
        rows, widest = sum(g.end - g.begin for g in batch), max(len(g.prompt) for g in batch)
        assert rows * (widest + max(g.longest for g in batch)) <= tokens or len(batch) == 1


def test_sharing_is_worthwhile_where_prompts_are_long() -> None:
    def eight(prompt: int, response: int) -> list[branching.Group]:
        return branching.groups([single(0, (1,) * prompt, (2,) * response, True)] * 8, 10_000)

    assert branching.worthwhile(eight(100, 20)) and not branching.worthwhile(eight(8, 100))
    assert not branching.worthwhile([]) and not branching.worthwhile(eight(100, 20)[:0])
