"""Algorithm 1 of the paper (Jiang et al. 2025), line for line, with its steps injected.

The same body serves tabular twins in tests, the simulator in one process, and the nightly flow whose steps are tasks.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

Policy = TypeVar("Policy")
Data = TypeVar("Data")
Data_contra = TypeVar("Data_contra", contravariant=True)
Q = TypeVar("Q")
Prompts = TypeVar("Prompts")


class ImprovementSteps(Protocol[Policy, Data_contra, Q, Prompts]):
    """Lines 5 to 7: what one round of policy iteration is made of."""

    def fit_q(self, policy: Policy, data: Data_contra) -> Q:
        """Line 5: a Q-function for `policy` by policy evaluation on its conversations."""

    def prompts(self, policy: Policy, data: Data_contra) -> Prompts:
        """Line 6: the single-turn prompts that `policy` uses for the states in `data`."""

    def improve(self, policy: Policy, prompts: Prompts, q: Q) -> Policy:
        """Line 7: SingleTurnOpt with the frozen Q as reward model."""


class Steps(ImprovementSteps[Policy, Data, Q, Prompts], Protocol[Policy, Data, Q, Prompts]):
    """All lines of Algorithm 1."""

    def initialize(self) -> Policy:
        """Line 1: pi_0."""

    def collect(self, policy: Policy) -> Data:
        """Line 4: deploy the policy and collect conversations."""

    def converged(self, q: Q, policy: Policy, data: Data) -> bool:
        """Line 9: whether Q_i, fitted on `data`, has converged, or the budget is spent."""


def policy_iteration_step(
    policy: Policy, data: Data, steps: ImprovementSteps[Policy, Data, Q, Prompts]
) -> tuple[Q, Policy]:
    """Lines 5 to 7: evaluate pi_i on its own conversations, then improve it turn by turn. Returns (Q_i, pi_{i+1})."""
    q = steps.fit_q(policy, data)
    prompts = steps.prompts(policy, data)
    return q, steps.improve(policy, prompts, q)


def iterative_ppo(steps: Steps[Policy, Data, Q, Prompts]) -> Policy:
    """Algorithm 1: repeat collect, evaluate, improve until Q_i has converged; returns the last policy."""
    policy = steps.initialize()
    while True:
        data = steps.collect(policy)
        q, improved = policy_iteration_step(policy, data, steps)
        finished = steps.converged(q, policy, data)
        policy = improved
        if finished:
            return policy
