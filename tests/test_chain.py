"""The enumerable chain is solved exactly, its conversations agree with the solution, and the paper's theorems hold."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from tabular import EVIDENCE_SHARE, OUTCOMES, mean_per_pair, pairs, softmax_improvement

from iterative_ppo.environments.chain import ACTIONS, Chain, greedy
from iterative_ppo.mdp.conversation import ADOPTIONS
from iterative_ppo.mdp.returns import monte_carlo
from iterative_ppo.mdp.turn_table import actions, conversations, to_frame

GAMMA = 0.95
CHAIN = Chain.default()
EXACT = 1e-12


def random_policy(chain: Chain, rng: np.random.Generator, concentration: float = 0.7) -> np.ndarray:
    """(S, A) a policy with a Dirichlet row for each state."""
    return rng.dirichlet(np.full(len(ACTIONS), concentration), chain.states)


def random_chain(rng: np.random.Generator) -> Chain:
    """Random kernels: what holds here owes nothing to the default chain's numbers."""
    states = 3 * int(rng.integers(2, 5))
    customer = rng.dirichlet(np.full(states + 2, 0.3), (states, len(ACTIONS)))
    business = rng.dirichlet(np.ones(len(ADOPTIONS)), len(ACTIONS))
    return Chain(3, rng.dirichlet(np.ones(states)), business, customer)


def chains(count: int) -> list[tuple[Chain, np.random.Generator]]:
    """The default chain and random ones, each with a generator for random policies."""
    rngs = [np.random.default_rng(seed) for seed in range(count)]
    return [(random_chain(rng) if seed else CHAIN, rng) for seed, rng in enumerate(rngs)]


def expected(policy: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(S,) E_{a ~ pi}[q(s, a)]."""
    return (policy * q).sum(axis=1)


def kl(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """(S,) KL(p(.|s) || q(.|s))."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(p > 0, p * (np.log(p) - np.log(q)), 0.0).sum(axis=1)


# --- exactness -------------------------------------------------------------------------------------------------------


def test_kernels_are_equation_2_written_out() -> None:
    """P(s' | s, a) = sum_m P(s' | s, m) P(m | a), where silence ends the conversation."""
    for state in range(CHAIN.states):
        for action in range(len(ACTIONS)):
            verbatim, edited, rejected, silence = CHAIN.business[action]
            row = (verbatim + edited) * CHAIN.customer[state, action] + rejected * CHAIN.customer[state, 2]
            assert np.allclose(CHAIN.transition[state, action], row[:-2], atol=EXACT)
            assert CHAIN.reward[state, action] == pytest.approx(row[-2], abs=EXACT)
            assert row.sum() + silence == pytest.approx(1.0, abs=EXACT)


@pytest.mark.parametrize("gamma", [0.0, 0.5, GAMMA, 1.0])
def test_q_pi_solves_the_bellman_equation(gamma: float) -> None:
    for chain, rng in chains(10):
        policy = random_policy(chain, rng)
        q = chain.q_pi(policy, gamma)
        backup = chain.reward + gamma * chain.transition @ expected(policy, q)
        assert np.abs(q - backup).max() < EXACT
        assert np.abs(expected(policy, q) - chain.v_pi(policy, gamma)).max() < EXACT
        assert chain.value(policy, gamma) == pytest.approx(chain.start @ expected(policy, q), abs=EXACT)


def test_v_pi_is_the_limit_of_plain_sweeps() -> None:
    """No linear algebra: expected discounted outcome after 400 turns, from 0."""
    policy = random_policy(CHAIN, np.random.default_rng(1))
    value = np.zeros(CHAIN.states)
    for _ in range(400):
        value = expected(policy, CHAIN.reward + GAMMA * CHAIN.transition @ value)
    assert np.abs(value - CHAIN.v_pi(policy, GAMMA)).max() < EXACT


@pytest.mark.parametrize("gamma", [0.0, 0.5, GAMMA, 1.0])
def test_optimal_is_the_fixed_point_of_value_iteration(gamma: float) -> None:
    for chain, rng in chains(10):
        best, q = chain.optimal(gamma)
        assert np.abs(q - chain.reward - gamma * chain.transition @ q.max(axis=1)).max() < EXACT
        assert np.abs(chain.v_pi(greedy(q), gamma) - best).max() < EXACT
        for _ in range(20):
            assert (best - chain.v_pi(random_policy(chain, rng), gamma) >= -EXACT).all()


def test_the_default_chain_needs_foresight_and_all_three_actions() -> None:
    best, q = CHAIN.optimal(GAMMA)
    value = float(CHAIN.start @ best)
    assert CHAIN.value(CHAIN.uniform(), GAMMA) < 0.5 * value
    assert CHAIN.value(greedy(CHAIN.reward), GAMMA) < 0.5 * value, "the best next outcome should be a bad aim"
    assert set(q.argmax(axis=1)) == {0, 1, 2}


@pytest.mark.parametrize("policy", [CHAIN.uniform(), greedy(CHAIN.optimal(GAMMA)[1])], ids=["uniform", "optimal"])
def test_few_conversations_are_longer_than_twelve_turns(policy: np.ndarray) -> None:
    moves = np.einsum("sa,sat->st", policy, CHAIN.transition)
    assert CHAIN.start @ np.linalg.matrix_power(moves, 12).sum(axis=1) < 0.03


def test_states_are_read_from_the_message_and_nothing_else_is() -> None:
    assert [CHAIN.state_of(CHAIN.text(state)) for state in range(CHAIN.states)] == list(range(CHAIN.states))
    for message in (
        "deal",
        "",
        "progress 0 patience 0",
        "progress 0 patience 4",
        "progress 5 patience 1",
        "progress 1",
    ):
        with pytest.raises(ValueError, match="no message of this chain"):
            CHAIN.state_of(message)


def test_kernels_and_policies_that_are_no_distributions_are_refused() -> None:
    with pytest.raises(ValueError, match="start"):
        Chain(CHAIN.patience, CHAIN.start * 2, CHAIN.business, CHAIN.customer)
    with pytest.raises(ValueError, match="sum to 1"):
        CHAIN.v_pi(CHAIN.uniform() * 2, GAMMA)
    with pytest.raises(ValueError, match="shape"):
        CHAIN.sample(np.ones((2, 3)) / 3, 1, seed=0)


# --- conversations ---------------------------------------------------------------------------------------------------

BEHAVIOUR = random_policy(CHAIN, np.random.default_rng(7), concentration=3.0)
TALKS = CHAIN.sample(BEHAVIOUR, 20_000, seed=3)
FRAME = to_frame(TALKS, OUTCOMES, EVIDENCE_SHARE)


def within(mean: float, truth: float, count: int, errors: float = 4.0) -> bool:
    """Whether the mean of `count` values in [0, 1] is within `errors` standard errors of its expectation."""
    return abs(mean - truth) <= errors * math.sqrt(max(truth * (1 - truth), 1e-9) / count)


def test_monte_carlo_returns_converge_to_q_pi() -> None:
    """Observation 2: the mean of G over the visits of (s, a) is Q^pi(s, a)."""
    truth = CHAIN.q_pi(BEHAVIOUR, GAMMA)
    mean, count = mean_per_pair(CHAIN, FRAME, monte_carlo(FRAME, GAMMA)[actions(FRAME)])
    often = np.argwhere(count >= 100)
    assert len(often) >= 35
    assert all(within(mean[s, a], truth[s, a], count[s, a]) for s, a in often)


def test_monte_carlo_returns_differ_from_another_policys_q() -> None:
    """The test above can fail: these conversations do not tell of the uniform policy."""
    truth = CHAIN.q_pi(CHAIN.uniform(), GAMMA)
    mean, count = mean_per_pair(CHAIN, FRAME, monte_carlo(FRAME, GAMMA)[actions(FRAME)])
    assert not all(within(mean[s, a], truth[s, a], count[s, a]) for s, a in np.argwhere(count >= 100))


def test_share_of_success_and_visits_are_the_exact_ones() -> None:
    share = np.mean([talk.turns[-1].outcomes[0] for talk in TALKS])
    assert within(float(share), CHAIN.value(BEHAVIOUR, 1.0), len(TALKS))
    visits = np.bincount(pairs(CHAIN, FRAME)[0], minlength=CHAIN.states) / len(TALKS)
    exact = CHAIN.start @ CHAIN.visits(BEHAVIOUR, 1.0)
    assert np.abs(visits - exact).max() < 4 * math.sqrt(2 * exact.max() / len(TALKS))


def test_conversations_are_well_formed() -> None:
    for talk in TALKS[:2000]:
        *acted, last = talk.turns
        assert acted and not any(turn.terminal or any(turn.outcomes) for turn in acted)
        assert last.terminal and last.business_message is None
        assert last.outcomes == ((1.0,) if last.customer_message else (0.0,))
        assert all(turn.business_message is not None for turn in acted[:-1])
        assert (acted[-1].business_message is None) == (acted[-1].adoption == "no_reply")


def test_the_logged_logprob_is_that_of_the_policy() -> None:
    states, chosen = pairs(CHAIN, FRAME)
    logged = FRAME["behaviour_logprob"].to_numpy()[actions(FRAME)]
    assert np.abs(logged - np.log(BEHAVIOUR[states, chosen])).max() < EXACT


def test_adoption_follows_the_business_kernel() -> None:
    rows = FRAME[actions(FRAME)]
    for action, text in enumerate(ACTIONS):
        taken = rows[rows["suggestion"] == text]
        assert set(taken["suggestion_status"]) == {"suggested" if text else "abstained"}
        for kind, truth in zip(ADOPTIONS, CHAIN.business[action], strict=True):
            found = taken["adoption"].isna() if not text and kind == "rejected" else taken["adoption"] == kind
            assert within(float(found.fillna(False).mean()), truth, len(taken))


def test_a_seed_names_its_conversations() -> None:
    assert CHAIN.sample(BEHAVIOUR, 50, seed=3) == CHAIN.sample(BEHAVIOUR, 50, seed=3)
    other = CHAIN.sample(BEHAVIOUR, 50, seed=4, policy_version="v2")
    assert [t.turns for t in other] != [t.turns for t in CHAIN.sample(BEHAVIOUR, 50, seed=3)]
    assert not {t.conversation_id for t in other} & {t.conversation_id for t in TALKS}
    assert {t.policy_version for t in other} == {"v2"} and CHAIN.sample(BEHAVIOUR, 0, seed=0) == []


def test_the_turn_table_gives_the_conversations_back() -> None:
    rows = sum(len(talk.turns) for talk in TALKS[:500])
    assert list(conversations(FRAME.head(rows))) == TALKS[:500]


# --- Theorem 1 -------------------------------------------------------------------------------------------------------


Step = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]


def mixed_with_greedy(policy: np.ndarray, q: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A step of random length towards argmax_a Q, another one in each state."""
    step = rng.uniform(size=(len(policy), 1)) * (rng.uniform(size=(len(policy), 1)) < 0.7)
    return (1 - step) * policy + step * greedy(q)


def reweighted(policy: np.ndarray, q: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """pi exp(Q / beta), beta from .003 to 3."""
    return softmax_improvement(policy, q, beta=float(10 ** rng.uniform(-2.5, 0.5)))


def any_improvement(policy: np.ndarray, q: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Random rows, kept only where they satisfy the premise."""
    other = rng.dirichlet(np.ones(q.shape[1]), len(policy))
    return np.where((expected(other, q) >= expected(policy, q))[:, None], other, policy)


@pytest.mark.parametrize("improve", [mixed_with_greedy, reweighted, any_improvement])
@pytest.mark.parametrize("gamma", [0.3, GAMMA])
def test_theorem_1_a_single_turn_improvement_improves_every_state(improve: Step, gamma: float) -> None:
    strict = 0
    for chain, rng in chains(60):
        policy = random_policy(chain, rng)
        q = chain.q_pi(policy, gamma)
        better = improve(policy, q, rng)
        assert (expected(better, q) >= expected(policy, q) - 1e-15).all(), "premise"
        gain = chain.v_pi(better, gamma) - chain.v_pi(policy, gamma)
        assert (gain >= -EXACT).all()
        strict += bool(gain.max() > 1e-6)
    assert strict > 50, "nearly all of these are real improvements"


def test_performance_difference_lemma() -> None:
    """Appendix A: V^pi'(s0) - V^pi(s0) = E_{d^pi'}[ E_pi'[A^pi] ] / (1 - gamma), for any two policies."""
    for chain, rng in chains(20):
        policy, other = random_policy(chain, rng), random_policy(chain, rng)
        advantage = expected(other, chain.q_pi(policy, GAMMA)) - chain.v_pi(policy, GAMMA)
        difference = chain.v_pi(other, GAMMA) - chain.v_pi(policy, GAMMA)
        assert np.abs(chain.visits(other, GAMMA) @ advantage - difference).max() < EXACT


def test_without_the_premise_a_policy_can_be_worse() -> None:
    """The best next outcome is no single-turn improvement of the uniform policy, and it does worse."""
    uniform, myopic = CHAIN.uniform(), greedy(CHAIN.reward)
    q = CHAIN.q_pi(uniform, GAMMA)
    assert (expected(myopic, q) < expected(uniform, q)).any()
    assert CHAIN.value(myopic, GAMMA) < CHAIN.value(uniform, GAMMA) - 0.01


def test_an_improvement_on_average_over_the_old_states_can_be_worse() -> None:
    """Theorem 1 says *any* state: pi' gains where pi goes, loses where only pi' goes, and ends with nothing."""
    early = np.arange(CHAIN.states) < CHAIN.patience
    ask, close = np.eye(3)[[0] * CHAIN.states], np.eye(3)[[1] * CHAIN.states]
    policy = np.where(early[:, None], 0.02 * ask + 0.98 * close, greedy(CHAIN.optimal(GAMMA)[1]))
    gain = expected(ask, CHAIN.q_pi(policy, GAMMA)) - CHAIN.v_pi(policy, GAMMA)
    assert CHAIN.start @ CHAIN.visits(policy, GAMMA) @ gain > 0.01
    assert gain.min() < 0 and CHAIN.value(ask, GAMMA) < CHAIN.value(policy, GAMMA) - 0.05


# --- Theorem 2 -------------------------------------------------------------------------------------------------------


def forward_kl_maximiser(policy: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    """(S, A) argmax of E_pi'[q] - beta KL(pi || pi'): beta pi / (l - q) with l > max q such that the rows sum to 1."""
    low, high = q.max(axis=1, keepdims=True), q.max(axis=1, keepdims=True) + beta
    for _ in range(200):
        middle = (low + high) / 2
        with np.errstate(divide="ignore"):
            over = (beta * policy / (middle - q)).sum(axis=1, keepdims=True) > 1
        low, high = np.where(over, middle, low), np.where(over, high, middle)
    improved = beta * policy / (high - q)
    return improved / improved.sum(axis=1, keepdims=True)


def forward_objective(improved: np.ndarray, policy: np.ndarray, q: np.ndarray, beta: float) -> np.ndarray:
    """(S,) L_s(pi') of Theorem 2."""
    return expected(improved, q) - beta * kl(policy, improved)


def with_error(q: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Q_hat with max-norm error epsilon: half the time uniform noise, half the time +-epsilon everywhere."""
    noise = rng.uniform(-1, 1, q.shape)
    return q + epsilon * (np.sign(noise) if rng.uniform() < 0.5 else noise)


def test_the_forward_kl_maximiser_is_one() -> None:
    for chain, rng in chains(20):
        policy, beta = random_policy(chain, rng, 2.0), float(rng.uniform(0.05, 0.5))
        q = chain.q_pi(policy, GAMMA)
        best = forward_objective(forward_kl_maximiser(policy, q, beta), policy, q, beta)
        for other in (policy, greedy(q) * 0.9 + policy * 0.1, *(random_policy(chain, rng, 2.0) for _ in range(20))):
            assert (best >= forward_objective(other, policy, q, beta) - 1e-9).all()


@pytest.mark.parametrize("epsilon", [0.0, 0.001, 0.05, 0.5])
@pytest.mark.parametrize("slack", [0.0, 0.3], ids=["exact", "with slack"])
def test_theorem_2_inequality_6_and_its_bound_on_v(epsilon: float, slack: float) -> None:
    """E_pi'[A^pi] >= beta KL(pi || pi') - delta_s - 2 epsilon in each state, hence the bound on V^pi' - V^pi."""
    for chain, rng in chains(40):
        policy, beta = random_policy(chain, rng, 2.0), float(rng.uniform(0.02, 0.5))
        estimate = with_error(chain.q_pi(policy, GAMMA), epsilon, rng)
        best = forward_kl_maximiser(policy, estimate, beta)
        improved = (1 - slack) * best + slack * random_policy(chain, rng, 2.0)
        delta = forward_objective(best, policy, estimate, beta) - forward_objective(improved, policy, estimate, beta)
        advantage = expected(improved, chain.q_pi(policy, GAMMA)) - chain.v_pi(policy, GAMMA)
        bound = beta * kl(policy, improved) - np.maximum(delta, 0) - 2 * epsilon
        assert (advantage >= bound - 1e-9).all()
        gain = chain.v_pi(improved, GAMMA) - chain.v_pi(policy, GAMMA)
        assert (gain >= chain.visits(improved, GAMMA) @ bound - 1e-9).all()


@pytest.mark.parametrize("epsilon", [0.0, 0.001, 0.05, 0.5])
def test_theorem_2_holds_with_ppos_direction_of_kl(epsilon: float) -> None:
    """PPO penalises KL(pi' || pi), maximised by pi exp(Q_hat / beta): the same proof, with that KL in (6)."""
    for chain, rng in chains(40):
        policy, beta = random_policy(chain, rng, 2.0), float(rng.uniform(0.02, 0.5))
        estimate = with_error(chain.q_pi(policy, GAMMA), epsilon, rng)
        improved = softmax_improvement(policy, estimate, beta)
        both = beta * (kl(improved, policy) + kl(policy, improved))
        assert np.allclose(expected(improved, estimate) - expected(policy, estimate), both, atol=1e-9)
        advantage = expected(improved, chain.q_pi(policy, GAMMA)) - chain.v_pi(policy, GAMMA)
        assert (advantage >= both - 2 * epsilon - 1e-9).all()


def test_the_bound_needs_the_kl_that_was_maximised() -> None:
    """The last display of appendix B prints KL(pi' || pi) where (6) has KL(pi || pi'); so printed, it is not true."""
    policy = 0.9999 * greedy(-CHAIN.q_pi(CHAIN.uniform(), GAMMA)) + 0.0001 * CHAIN.uniform()
    improved = forward_kl_maximiser(policy, CHAIN.q_pi(policy, GAMMA), beta := 0.02)
    gain = CHAIN.v_pi(improved, GAMMA) - CHAIN.v_pi(policy, GAMMA)
    assert (gain >= CHAIN.visits(improved, GAMMA) @ (beta * kl(policy, improved)) - 1e-9).all()
    assert (gain < CHAIN.visits(improved, GAMMA) @ (beta * kl(improved, policy)) - 0.01).any()


def test_a_q_with_a_large_error_can_make_the_policy_worse() -> None:
    """What 2 epsilon is there for: with Q_hat = -Q the maximiser is a worse policy."""
    policy = CHAIN.uniform()
    q = CHAIN.q_pi(policy, GAMMA)
    assert CHAIN.value(forward_kl_maximiser(policy, q, 0.05), GAMMA) > CHAIN.value(policy, GAMMA) + 0.02
    assert CHAIN.value(forward_kl_maximiser(policy, -q, 0.05), GAMMA) < CHAIN.value(policy, GAMMA) - 0.02
