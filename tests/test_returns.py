"""Returns against plain loops: r_i = o_{i+1}, G_i = sum_j gamma^j r_{i+j}, for any lengths and outcomes, at any row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iterative_ppo.errors import ConfigError
from iterative_ppo.mdp.conversation import MISSING, Adoption, Conversation, Suggestion, Turn, adoption_of
from iterative_ppo.mdp.returns import (
    acceptance_rewards,
    discounted_returns,
    monte_carlo,
    rewards,
)
from iterative_ppo.mdp.turn_table import conform, last_rows, to_frame

OUTCOMES = {"purchase": 1.0, "contact": -0.25}
VALUES = st.floats(-1e6, 1e6)
GAMMAS = st.floats(0.0, 1.0, exclude_max=True)
TALKS = st.lists(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=12), max_size=8)
"""Outcomes of every turn of some conversations."""


def talk(number: int, outcomes: list[tuple[float, float]]) -> Conversation:
    """A conversation with these outcomes; the last turn is terminal."""
    acted = [Turn("c", o, Suggestion("a", "suggested"), "m", "verbatim") for o in outcomes[:-1]]
    return Conversation(f"{number:03d}", (*acted, Turn(None, outcomes[-1])), f"customer {number}")


def plain_returns(rewards_of_one: list[float], gamma: float) -> list[float]:
    """The definition, one sum a row."""
    return [
        sum(gamma**j * reward for j, reward in enumerate(rewards_of_one[row:])) for row in range(len(rewards_of_one))
    ]


@settings(deadline=None, max_examples=60)
@given(TALKS, GAMMAS)
def test_monte_carlo_is_the_sum_written_out(talks: list[list[tuple[float, float]]], gamma: float) -> None:
    frame = to_frame([talk(n, outcomes) for n, outcomes in enumerate(talks)], OUTCOMES, 0.2)
    expected: list[float] = []
    for outcomes in talks:
        weighted = [a - 0.25 * b for a, b in outcomes]
        expected += plain_returns([*weighted[1:], 0.0], gamma)
    assert np.allclose(monte_carlo(frame, gamma), expected, rtol=1e-9, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(TALKS, GAMMAS)
def test_a_named_outcome_has_its_own_returns(talks: list[list[tuple[float, float]]], gamma: float) -> None:
    frame = to_frame([talk(n, outcomes) for n, outcomes in enumerate(talks)], OUTCOMES, 0.2)
    for index, name in enumerate(("outcome_purchase", "outcome_contact")):
        expected = [g for turns in talks for g in plain_returns([*(o[index] for o in turns[1:]), 0.0], gamma)]
        assert np.allclose(monte_carlo(frame, gamma, name), expected, rtol=1e-9, atol=1e-6)


@settings(deadline=None)
@given(st.lists(st.lists(VALUES, min_size=1, max_size=15), max_size=10), GAMMAS)
def test_discounted_returns_of_any_rewards_even_in_terminal_rows(blocks: list[list[float]], gamma: float) -> None:
    reward = np.array([value for block in blocks for value in block])
    last = np.array([row == len(block) - 1 for block in blocks for row in range(len(block))], dtype=bool)
    before = reward.copy()
    expected = [g for block in blocks for g in plain_returns(block, gamma)]
    assert np.allclose(discounted_returns(reward, last, gamma), expected, rtol=1e-9, atol=1e-6)
    assert np.array_equal(reward, before), "the rewards given are left alone"


@settings(deadline=None, max_examples=30)
@given(TALKS)
def test_rewards_are_the_outcome_on_arrival_and_never_anothers(talks: list[list[tuple[float, float]]]) -> None:
    frame = to_frame([talk(n, outcomes) for n, outcomes in enumerate(talks)], OUTCOMES, 0.2)
    expected = [value for turns in talks for value in [*(a for a, _ in turns[1:]), 0.0]]
    assert rewards(frame, "outcome_purchase").tolist() == expected
    assert (rewards(frame)[last_rows(frame)] == 0.0).all()


def test_the_papers_case_one_outcome_at_the_end() -> None:
    """Three actions, then o = 1: G = gamma^2, gamma, 1, and the terminal row pays nothing more."""
    outcomes = [(0.0, 0.0)] * 3 + [(1.0, 0.0)]
    frame = to_frame([talk(0, outcomes)], OUTCOMES, 0.2)
    assert np.allclose(monte_carlo(frame, 0.9), [0.81, 0.9, 1.0, 0.0])
    assert monte_carlo(frame, 0.0).tolist() == [0.0, 0.0, 1.0, 0.0], "gamma = 0: the next outcome alone"


def test_long_conversations_do_not_lose_the_outcome() -> None:
    gamma, turns = 0.999, 5000
    reward, last = np.zeros(turns), np.zeros(turns, dtype=bool)
    reward[-1], last[-1] = 1.0, True
    assert np.allclose(discounted_returns(reward, last, gamma), gamma ** np.arange(turns)[::-1], rtol=1e-9)


@pytest.mark.parametrize("gamma", [1.0, -0.01, 1.5, float("nan"), float("inf")])
def test_a_gamma_outside_its_range_is_refused(gamma: float) -> None:
    with pytest.raises(ConfigError, match="gamma is"):
        discounted_returns(np.ones(1), np.ones(1, dtype=bool), gamma)


def test_integer_rewards_are_not_truncated() -> None:
    returns = discounted_returns(np.array([1, 1]), np.array([False, True]), 0.5)
    assert returns.tolist() == [1.5, 1.0]


def test_a_table_without_rows_has_no_returns() -> None:
    frame = to_frame([], OUTCOMES, 0.2)
    for values in (monte_carlo(frame, 0.9), rewards(frame), acceptance_rewards(frame)):
        assert values.shape == (0,)


# --- acceptance ------------------------------------------------------------------------------------------------------

PAYS: list[tuple[Adoption | None, float]] = [
    ("verbatim", 1.0),
    ("edited", 0.5),
    ("rejected", 0.0),
    ("no_reply", 0.0),
    (None, 0.0),
]


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from(PAYS), max_size=10))
def test_acceptance_rewards_pay_for_what_the_business_did_with_it(kinds: list[tuple[Adoption | None, float]]) -> None:
    acted = [Turn("c", (), Suggestion("a", "suggested"), "m", kind) for kind, _ in kinds]
    frame = to_frame([Conversation("t", (*acted, Turn(None)), "u")], {}, 0.2)
    assert acceptance_rewards(frame).tolist() == [pay for _, pay in kinds] + [0.0]


def test_acceptance_of_a_column_that_holds_nothing() -> None:
    frame = to_frame([Conversation("t", (Turn("c", (), MISSING, "m"), Turn(None)), "u")], {}, 0.2)
    assert acceptance_rewards(conform(frame.assign(adoption=None), {})).tolist() == [0.0, 0.0]


ADOPTION_CASES = [
    ("Which room?", None, "no_reply"),
    ("Which room?", "Which room?", "verbatim"),
    ("Which room?", "  which   ROOM? ", "verbatim"),
    ("Straße", "STRASSE", "verbatim"),
    ("Which room is it?", "Which rooms is it?", "edited"),
    ("Which room is it?", "We are closed today.", "rejected"),
    ("", "hello", "rejected"),
    ("", "", "verbatim"),
    ("hello", "", "rejected"),
]


@pytest.mark.parametrize(("suggestion", "sent", "kind"), ADOPTION_CASES)
def test_adoption_by_similarity(suggestion: str, sent: str | None, kind: Adoption) -> None:
    assert adoption_of(suggestion, sent, edited_at_least=0.6) == kind


@settings(deadline=None)
@given(st.text(max_size=60), st.text(max_size=60), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_higher_threshold_never_turns_a_rejection_into_an_edit(a: str, b: str, one: float, two: float) -> None:
    low, high = sorted((one, two))
    if adoption_of(a, b, low) == "rejected":
        assert adoption_of(a, b, high) == "rejected"
    assert adoption_of(a, a, high) == "verbatim" and adoption_of(a, b, 0.0) != "rejected"


def test_long_messages_are_compared_whole() -> None:
    """Without autojunk: in texts over 200 characters the common letters count, too."""
    text = "please tell me which room you would like to have renovated " * 10
    assert adoption_of(text, text + "?", 0.9) == "edited"
