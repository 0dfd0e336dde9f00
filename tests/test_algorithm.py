"""Algorithm 1: its lines in order, each on the round's own data, and the policy it reaches on the enumerable chain."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tabular import Improvement, TabularSteps, epsilon_greedy_improvement, greedy_improvement, pairs

from iterative_ppo.algorithm import ImprovementSteps, Steps, iterative_ppo, policy_iteration_step
from iterative_ppo.environments.chain import Chain, greedy
from iterative_ppo.mdp.turn_table import actions

GAMMA = 0.95
CHAIN = Chain.default()
BEST = float(CHAIN.start @ CHAIN.optimal(GAMMA)[0])
UNIFORM = CHAIN.value(CHAIN.uniform(), GAMMA)


def gained(policy: np.ndarray) -> float:
    """The share of V* - V0, at the start, that a policy reaches."""
    return (CHAIN.value(policy, GAMMA) - UNIFORM) / (BEST - UNIFORM)


@dataclass
class Recorder:
    """Steps whose every result names its round, and that notes each call with its arguments."""

    rounds: int
    calls: list[tuple[str, ...]] = field(default_factory=list)

    def note(self, *call: str) -> None:
        self.calls.append(call)

    def initialize(self) -> str:
        self.note("initialize")
        return "pi0"

    def collect(self, policy: str) -> str:
        self.note("collect", policy)
        return f"data of {policy}"

    def fit_q(self, policy: str, data: str) -> str:
        self.note("fit_q", policy, data)
        return f"Q of {policy}"

    def prompts(self, policy: str, data: str) -> str:
        self.note("prompts", policy, data)
        return f"prompts of {policy}"

    def improve(self, policy: str, prompts: str, q: str) -> str:
        self.note("improve", policy, prompts, q)
        return f"pi{int(policy[2:]) + 1}"

    def converged(self, q: str, policy: str, data: str) -> bool:
        self.note("converged", q, policy, data)
        return policy == f"pi{self.rounds - 1}"


def one_round(policy: str) -> list[tuple[str, ...]]:
    """Lines 4 to 9 of the paper for one policy."""
    data, q = f"data of {policy}", f"Q of {policy}"
    return [
        ("collect", policy),
        ("fit_q", policy, data),
        ("prompts", policy, data),
        ("improve", policy, f"prompts of {policy}", q),
        ("converged", q, policy, data),
    ]


@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_the_lines_run_in_the_papers_order_on_the_rounds_own_policy_and_data(rounds: int) -> None:
    steps = Recorder(rounds)
    assert iterative_ppo(steps) == f"pi{rounds}", "the last improved policy is returned"
    assert steps.calls == [("initialize",), *(call for i in range(rounds) for call in one_round(f"pi{i}"))]


def test_policy_iteration_step_is_lines_5_to_7_and_no_other() -> None:
    steps = Recorder(rounds=1)
    assert policy_iteration_step("pi7", "data of pi7", steps) == ("Q of pi7", "pi8")
    assert steps.calls == one_round("pi7")[1:-1]


def test_policy_iteration_step_needs_no_more_than_those_three_steps() -> None:
    class Three:
        def fit_q(self, policy: int, data: list[int]) -> float:
            return policy + sum(data)

        def prompts(self, policy: int, data: list[int]) -> int:
            return len(data)

        def improve(self, policy: int, prompts: int, q: float) -> int:
            return policy + prompts + int(q)

    three: ImprovementSteps[int, list[int], float, int] = Three()
    assert policy_iteration_step(1, [2, 3], three) == (6, 9)


def test_an_error_in_a_step_is_not_swallowed() -> None:
    class Broken(Recorder):
        def improve(self, policy: str, prompts: str, q: str) -> str:
            raise RuntimeError("no GPU")

    steps = Broken(rounds=3)
    with pytest.raises(RuntimeError, match="no GPU"):
        iterative_ppo(steps)
    assert steps.calls[-1][0] == "prompts", "nothing is collected or judged after a failed improvement"


@dataclass
class Watched(TabularSteps):
    """Keeps each round's policy and data."""

    seen: list[tuple[np.ndarray, pd.DataFrame]] = field(default_factory=list)

    def collect(self, policy: np.ndarray) -> pd.DataFrame:
        data = super().collect(policy)
        self.seen.append((policy, data))
        return data


def test_each_rounds_data_come_from_that_rounds_policy() -> None:
    steps = Watched(conversations=500, max_rounds=3)
    iterative_ppo(steps)
    assert len(steps.seen) == 3
    for policy, data in steps.seen:
        logged = data["behaviour_logprob"].to_numpy()[actions(data)]
        assert np.allclose(logged, np.log(policy[pairs(CHAIN, data)]))
    assert len({conversation for _, data in steps.seen for conversation in data["conversation_id"]}) == 1500
    assert not np.allclose(steps.seen[0][0], steps.seen[1][0])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_four_rounds_of_20k_conversations_reach_95_percent_of_the_possible_gain(seed: int) -> None:
    """State tolerance: from every state that an optimal policy visits, at least 85 % of V*, too."""
    steps: Steps[np.ndarray, Any, np.ndarray, np.ndarray] = TabularSteps(conversations=20_000, seed=seed, max_rounds=4)
    policy = iterative_ppo(steps)
    assert gained(policy) >= 0.95
    best, q = CHAIN.optimal(GAMMA)
    visited = CHAIN.start @ CHAIN.visits(greedy(q), 1.0) > 0.05
    assert (CHAIN.v_pi(policy, GAMMA) >= 0.85 * best)[visited].all()


def test_each_round_is_better_than_the_one_before() -> None:
    steps = Watched(conversations=3000, max_rounds=3)
    last = iterative_ppo(steps)
    values = [CHAIN.value(policy, GAMMA) for policy in [*(policy for policy, _ in steps.seen), last]]
    assert np.diff(values).min() > 0 and values[0] == pytest.approx(UNIFORM)


def test_with_exact_evaluation_and_greedy_improvement_it_is_policy_iteration() -> None:
    """A few rounds end at V*: nothing is lost but by estimation."""

    class Exact(TabularSteps):
        def fit_q(self, policy: np.ndarray, data: pd.DataFrame) -> np.ndarray:
            return self.chain.q_pi(policy, self.gamma)

    policy = iterative_ppo(Exact(conversations=3000, max_rounds=6, improvement=lambda _, q: greedy(q)))
    assert gained(policy) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("improvement", [greedy_improvement, epsilon_greedy_improvement])
def test_the_other_improvements_gain_much_of_it_too(improvement: Improvement) -> None:
    """Less than the KL-regularised one: what is hardly sampled is hardly known (the paper's action coverage)."""
    steps = TabularSteps(conversations=5000, improvement=improvement, max_rounds=2)
    assert 0.4 < gained(iterative_ppo(steps)) < 0.97


def test_convergence_stops_before_the_budget_ends() -> None:
    steps = TabularSteps(conversations=2000, max_rounds=50, tolerance=0.05)
    iterative_ppo(steps)
    assert 2 <= len(steps.history) < 15
