"""A head for each outcome beside one for their weighted sum, where a purchase needs three facts first."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import facts
from benchmarks.q_cells import FITTED, Row, cell, row, sections
from benchmarks.q_simulator import worth
from benchmarks.results_file import averaged, beyond_doubt
from iterative_ppo.config import Config, load_config
from iterative_ppo.evaluation.metrics import within_state_ranking
from iterative_ppo.mdp.rendering import single
from iterative_ppo.mdp.turn_table import to_frame

FACTS_LOG, FACTS_STATES = 750, 200


def settings_of(heads: bool, seed: int) -> Config:
    most = 1.0 if heads else float(sum(facts.OUTCOMES.values()))
    given = {"seed": seed, "outcomes": facts.OUTCOMES, "q.outcome_heads": heads, "data.outcome_high": most}
    rates = {"q.learning_rate": 0.005, "q.value_learning_rate": 0.005, "q.epochs": 6.0, "q.value_epochs": 4.0}
    return load_config(None, {**given, **rates, "policy.hidden_size": 32, "policy.heads": 2})


def facts_ranking(heads: bool, seed: int) -> dict[str, float]:
    """Within-state correlation with the exact Q of the weighted sum, after 750 conversations."""
    from iterative_ppo.learning.policy_evaluation import fit_q
    from iterative_ppo.learning.rounds import round_of
    from iterative_ppo.learning.tiny import build_policy

    weights, config = np.array(list(facts.OUTCOMES.values())), settings_of(heads, seed)
    talks = facts.conversations(FACTS_LOG, seed)
    policy = build_policy(talks, config.policy, seed)
    q = fit_q(policy, round_of(policy, to_frame(talks, config.outcomes, 0.15), config), [], config)
    rng, exact = random.Random(seed), facts.exact_q(config.gamma)
    truth, sequences = [], []
    for talk in facts.conversations(FACTS_STATES, 10_000 + seed):
        turn = rng.randrange(len(talk.turns) - 1)
        truth.append(exact[facts.facts_known(talk, turn), turn] @ weights)
        prompt = policy.renderer.prompt(talk.state(turn)).tokens
        for action in facts.ACTIONS:
            said = (*policy.renderer.ids(action), policy.renderer.eos)
            sequences.append(single(len(sequences), prompt, said, True))
    predicted = worth(q, sequences).reshape(len(truth), -1)
    return {"ranking": within_state_ranking(np.array(truth), predicted)}


def _known(heads: bool, seed: int) -> list[Any]:
    config = settings_of(heads, seed)
    exact = [worth.tolist() for worth in facts.exact_q(config.gamma).values()]
    return [FACTS_LOG, FACTS_STATES, exact, sections(config, *FITTED)]


def outcomes(seeds: Sequence[int]) -> list[Row]:
    """A head for each of four outcomes beside one for their weighted sum, on the same conversations."""
    found = {
        name: [cell("outcomes", name, s, _known(heads, s), lambda h=heads, s=s: facts_ranking(h, s)) for s in seeds]
        for name, heads in (("a head each", True), ("one scalar", False))
    }
    rows = [row(f"three facts, within-state correlation, {name}", f, "ranking") for name, f in found.items()]
    pairs = zip(found["a head each"], found["one scalar"], strict=True)
    less = [a["ranking"] - b["ranking"] for a, b in pairs]
    return [*rows, averaged("three facts, heads less scalar", less, seeds, "> 0", beyond_doubt)]
