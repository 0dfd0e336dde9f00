"""Counterfactual truth in the simulator, and the ranking of Q against it."""

from __future__ import annotations

import numpy as np

from iterative_ppo.environments.renovation import Renovation, Script
from iterative_ppo.mdp.conversation import ABSTAIN, State, Suggestion, Turn
from tasks.ranking import distinct_actions, true_values

ASK_BUDGET = "What budget do you have in mind?"
READY = State(
    (Turn("Hi, need work on my kitchen.", (0.0,), Suggestion(ASK_BUDGET, "suggested"), ASK_BUDGET, "verbatim"),),
    "About five thousand.",
)
RIGHT = Suggestion("We can do your kitchen with our basic package.", "suggested")
WRONG = Suggestion("We can do your bedroom with our basic package.", "suggested")


class Parrot:
    """Says three things in turn."""

    def sample(self, states: list[State], seed: int) -> list[Suggestion]:
        return [(RIGHT, WRONG, ABSTAIN)[k % 3] for k in range(len(states))]


def test_the_matching_offer_is_worth_more_than_a_wrong_one_and_than_waiting() -> None:
    truth = true_values(Script(1.0), Renovation(), [(READY, [RIGHT, WRONG, ABSTAIN])], 400, 0.95, seed=1)  # type: ignore[arg-type]
    assert truth.shape == (1, 3, 400)
    right, wrong, abstained = truth.mean(axis=2)[0]
    assert right > wrong + 0.1
    assert right > abstained + 0.03
    assert np.all((truth >= 0) & (truth <= 1))


def test_a_purchase_at_once_is_not_discounted() -> None:
    truth = true_values(Script(1.0), Renovation(), [(READY, [RIGHT])], 200, 0.5, seed=2)  # type: ignore[arg-type]
    assert truth.max() == 1.0


def test_states_that_offer_too_few_actions_are_left_out() -> None:
    assert [len(said) for _, said in distinct_actions(Parrot(), [READY], 3, seed=0)] == [3]  # type: ignore[arg-type]
    assert distinct_actions(Parrot(), [READY], 4, seed=0) == []  # type: ignore[arg-type]
