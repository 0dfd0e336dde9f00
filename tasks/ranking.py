"""Within-state ranking (simulators only): does Q order the actions of one state as their true worth does?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from iterative_ppo.environments.rollout import play
from iterative_ppo.evaluation.metrics import within_state_ranking
from iterative_ppo.mdp.conversation import State, Suggestion
from iterative_ppo.mdp.rendering import single

if TYPE_CHECKING:
    from iterative_ppo.environments.renovation import Renovation, Session
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.q_model import QModel


@dataclass(frozen=True)
class Ranking:
    """Correlation of Q with the truth after subtracting each state's mean; the ceiling is truth with itself."""

    correlation: float
    ceiling: float
    states: int
    actions: int
    rollouts: int


def distinct_actions(
    policy: LanguagePolicy, states: list[State], actions: int, seed: int
) -> list[tuple[State, list[Suggestion]]]:
    """States with `actions` distinct samples of the policy; a state with fewer in 8 times the draws is left out."""
    draws = 8 * actions
    said = policy.sample([state for state in states for _ in range(draws)], seed)
    found = []
    for k, state in enumerate(states):
        texts: dict[str, Suggestion] = {}
        for action in said[k * draws : (k + 1) * draws]:
            texts.setdefault(f"{action.status}:{action.text}", action)
        if len(texts) >= actions:
            found.append((state, list(texts.values())[:actions]))
    return found


def true_values(
    policy: LanguagePolicy,
    environment: Renovation,
    chosen: list[tuple[State, list[Suggestion]]],
    rollouts: int,
    gamma: float,
    seed: int,
) -> np.ndarray:
    """(S, A, rollouts) returns of each action: hidden states from the exact posterior, then the policy's turns."""
    sessions: list[Session] = []
    for k, (state, actions) in enumerate(chosen):
        for action in actions:
            futures = environment.resume(state, rollouts, seed * 1_000_003 + k)
            for session in futures:
                session.step(action)
            sessions += futures
    play(policy, sessions, seed)
    before = np.repeat([len(state.history) for state, actions in chosen for _ in actions], rollouts)
    returns = np.array(
        [gamma ** (len(s.turns) - 2 - b) * s.turns[-1].outcomes[0] for s, b in zip(sessions, before, strict=True)]
    )
    return returns.reshape(len(chosen), -1, rollouts)


def rank(
    policy: LanguagePolicy,
    q: QModel,
    environment: Renovation,
    states: list[State],
    actions: int = 8,
    rollouts: int = 64,
    gamma: float = 0.95,
    seed: int = 0,
) -> Ranking:
    """The ranking of Q in on-policy states, beside the same figure between two halves of the rollouts."""
    chosen = distinct_actions(policy, states, actions, seed)
    truth = true_values(policy, environment, chosen, rollouts, gamma, seed)
    pairs = [(state, action) for state, said in chosen for action in said]
    render = policy.renderer
    sequences = [single(k, render.prompt(s).tokens, render.response(a), True) for k, (s, a) in enumerate(pairs)]
    predicted = np.array([value[-1] for value in q.running_values(sequences)]).reshape(len(chosen), -1)
    half = rollouts // 2
    return Ranking(
        within_state_ranking(truth.mean(axis=2), predicted),
        within_state_ranking(truth[:, :, :half].mean(axis=2), truth[:, :, half:].mean(axis=2)),
        len(chosen),
        actions,
        rollouts,
    )
