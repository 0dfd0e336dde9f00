"""Credit assigners where one turn is known to decide: does it rank first, and how steady are the ranks?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.q_cells import FITTED, Row, cell, row, sections
from benchmarks.results_file import at_least, averaged, beyond_doubt, figure
from iterative_ppo.config import Config, load_config
from iterative_ppo.mdp.conversation import Conversation, Suggestion, Turn
from iterative_ppo.mdp.turn_table import conversation_numbers, to_frame

ANSWERS = ("red", "blue", "green", "grey")
"""What the assistant says in any turn, at random; the first one sells where the customer has asked."""
TALK = ("go on", "tell me more", "i see", "and then")
QUESTION = "which one"
CREDIT_LOG, EVIDENCE_SHARE, SEEDS = 600, 0.3, range(20)
SMALL = {"policy.hidden_size": 32, "policy.heads": 2, "supervised.learning_rate": 0.01, "supervised.epochs": 2.0}
MORE = {"credit.batch_size": 8, "credit.epochs": 6.0}
"""Of so few and short conversations the process reward model needs more updates than by default."""


def conversations(count: int, seed: int) -> list[Conversation]:
    """Three to six turns each; in one of them, any, the customer asks, and that turn's answer alone decides."""
    rng = np.random.default_rng(seed)
    return [_conversation(f"{seed}-{k:05d}", rng) for k in range(count)]


def _conversation(name: str, rng: np.random.Generator) -> Conversation:
    length = int(rng.integers(3, 7))
    asked, said = int(rng.integers(length)), rng.choice(ANSWERS, length).tolist()
    heard = [QUESTION if i == asked else str(rng.choice(TALK)) for i in range(length)]
    logprob = -float(np.log(len(ANSWERS)))
    turns = [
        Turn(customer, (0.0,), Suggestion(answer, "suggested", logprob), answer, "verbatim")
        for customer, answer in zip(heard, said, strict=True)
    ]
    sold = said[asked] == ANSWERS[0]
    turns.append(Turn("sold" if sold else None, (float(sold),)))
    return Conversation(name, tuple(turns), f"customer-{name}", policy_version="any")


def settings_of(assigner: str, seed: int) -> Config:
    return load_config(None, {**SMALL, **MORE, "seed": seed, "credit.assigner": assigner})


def decisive_turn(assigner: str, seed: int) -> dict[str, float]:
    """Shares of conversations whose decisive turn ranks first, and the figures of the assigner's own report.

    First means the greatest turn reward of a conversation that sold, the least of one that did not. Norm-ITPO pays
    nothing where nothing was sold, so it is judged by the others.
    """
    from iterative_ppo.learning.credit import credited
    from iterative_ppo.learning.rounds import round_of
    from iterative_ppo.learning.supervised import fine_tune
    from iterative_ppo.learning.tiny import build_policy

    config = settings_of(assigner, seed)
    talks = conversations(CREDIT_LOG, seed)
    frame = to_frame(talks, config.outcomes, EVIDENCE_SHARE)
    untrained = build_policy(talks, config.policy, seed)
    sequences = [s for talk in talks for s in untrained.renderer.encode(talk)[0]]
    policy, _ = fine_tune(untrained, sequences, config.supervised, seed)
    current = round_of(policy, frame, config)
    credit = credited(policy, current, [], config)
    conversation = conversation_numbers(current.last)
    sold = np.bincount(conversation, current.reward) > 0
    held = np.bincount(conversation, ~current.fit) > 0
    asked = frame["customer_message"].eq(QUESTION).to_numpy(bool, na_value=False)
    found = first(credit.current.reward, conversation, ~current.last, sold) == np.flatnonzero(asked)
    error = np.abs(np.bincount(conversation, credit.current.reward) - sold).max()
    shares = {
        "sold": found[held & sold].mean(),
        "lost": found[held & ~sold].mean(),
        "sold_fit": found[~held & sold].mean(),
    }
    return {**{k: float(v) for k, v in shares.items()}, "sum_error": float(error), **credit.report}


def first(reward: np.ndarray, conversation: np.ndarray, turns: np.ndarray, sold: np.ndarray) -> np.ndarray:
    """(C,) row of each conversation's greatest turn reward; of its least where it did not sell."""
    signed = np.where(turns, np.where(sold[conversation], reward, -reward), -np.inf)
    order = np.lexsort((-signed, conversation))
    return order[np.append(True, np.diff(conversation[order]) > 0)]


def _known(assigner: str, seed: int) -> list[Any]:
    return [CREDIT_LOG, EVIDENCE_SHARE, sections(settings_of(assigner, seed), *FITTED, "supervised")]


def credit(seeds: Sequence[int] = SEEDS) -> list[Row]:
    """Both assigners on conversations that they have not learnt from."""
    found = {
        name: [cell("credit", name, s, _known(name, s), lambda a=name, s=s: decisive_turn(a, s)) for s in seeds]
        for name in ("norm_itpo", "itpo")
    }
    rows = []
    for name, cells in found.items():
        rows.append(row(f"{name}, decisive turn first, sold", cells, "sold", target=">= .9", met=at_least(0.9)))
        rows.append(row(f"{name}, Kendall's tau of the scores with the outcome", cells, "credit_kendall_tau"))
    ours = found["norm_itpo"]
    error = max(c["sum_error"] for c in ours)
    rows.append(figure("norm_itpo, sum of turn rewards less the outcome", error, None, "<= 1e-6", error <= 1e-6, seeds))
    rows.append(row("itpo, decisive turn last, not sold", found["itpo"], "lost"))
    stable = {k: f"credit_{k}_rank_stability" for k in ("turn", "token")}
    rows += [row(f"rank stability over updates, {k} scores", ours, key) for k, key in stable.items()]
    less = [c[stable["turn"]] - c[stable["token"]] for c in ours]
    return [*rows, averaged("rank stability, turn less token scores", less, seeds, "> 0", beyond_doubt)]
