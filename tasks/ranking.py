"""Within-state ranking (simulators only): does Q order the actions of one state as their true worth does?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from iterative_ppo.environments.rollout import play
from iterative_ppo.mdp.conversation import State, Suggestion

if TYPE_CHECKING:
    from iterative_ppo.environments.renovation import Renovation, Session
    from iterative_ppo.learning.language_model import LanguagePolicy


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
