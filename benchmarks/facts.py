"""A purchase that needs three facts elicited first, each an outcome of its own: small enough to solve exactly.

The assistant asks for the room, the budget or the date, offers, or chats. A customer tells an unknown fact when asked
for it, most often; an offer sells seldom before all three are known, and often ends the conversation. Every turn may be
the last. Paid at the end: the purchase, and each fact that was told by then.
"""

from __future__ import annotations

import itertools

import numpy as np

from iterative_ppo.mdp.conversation import Conversation, Suggestion, Turn

FACTS = ("room", "budget", "date")
OUTCOMES = {"purchase": 1.0, "room": 0.1, "budget": 0.1, "date": 0.1}
"""Weights in R."""
ACTIONS = ("ask room", "ask budget", "ask date", "offer", "chat")
OFFER = ACTIONS.index("offer")
TURNS = 8
TELLS, LEAVES, LEAVES_AFTER_OFFER = 0.75, 0.06, 0.4
SELLS = (0.02, 0.05, 0.15, 0.8)
"""Probability that an offer sells, by the number of facts known."""

Known = tuple[bool, bool, bool]


def after(known: Known, action: int) -> list[tuple[float, Known, str]]:
    """(probability, facts known then, "sold" | "left" | what the customer says) of everything that may follow."""
    if action == OFFER:
        sold = SELLS[sum(known)]
        gone = (1 - sold) * LEAVES_AFTER_OFFER
        return [(sold, known, "sold"), (gone, known, "left"), (1 - sold - gone, known, "not now")]
    told = TELLS if action < len(FACTS) and not known[action] else 0.0
    more = tuple(bool(k or i == action) for i, k in enumerate(known))
    stay = 1 - LEAVES
    answers = [(stay * (1 - told), known, "go on"), (LEAVES, known, "left")]
    return (
        [(stay * told, (more[0], more[1], more[2]), f"my {ACTIONS[action][4:]} is set"), *answers] if told else answers
    )


def ending(known: Known, sold: bool) -> np.ndarray:
    """(4,) outcomes in the order of OUTCOMES."""
    return np.array([float(sold), *map(float, known)])


def exact_q(gamma: float) -> dict[tuple[Known, int], np.ndarray]:
    """(A, 4) Q of the policy that picks any action, for each outcome, by facts known and number of the turn."""
    q: dict[tuple[Known, int], np.ndarray] = {}
    for turn in reversed(range(TURNS)):
        for known in itertools.product((False, True), repeat=len(FACTS)):
            worth = np.zeros((len(ACTIONS), len(OUTCOMES)))
            for action in range(len(ACTIONS)):
                for probability, then, said in after(known, action):  # type: ignore[arg-type]
                    over = said in ("sold", "left") or turn == TURNS - 1
                    value = ending(then, said == "sold") if over else gamma * q[then, turn + 1].mean(axis=0)
                    worth[action] += probability * value
            q[known, turn] = worth  # type: ignore[index]
    return q


def conversations(count: int, seed: int) -> list[Conversation]:
    """Conversations of that policy."""
    rng = np.random.default_rng(seed)
    return [_conversation(f"{seed}-{k:05d}", rng) for k in range(count)]


def _conversation(name: str, rng: np.random.Generator) -> Conversation:
    known: Known = (False, False, False)
    turns, said = [], "hello"
    for turn in range(TURNS):
        action = int(rng.integers(len(ACTIONS)))
        text = ACTIONS[action]
        turns.append(Turn(said, (0.0,) * 4, Suggestion(text, "suggested", -np.log(len(ACTIONS))), text, "verbatim"))
        options = after(known, action)
        _, known, said = options[rng.choice(len(options), p=[p for p, _, _ in options])]
        if said in ("sold", "left") or turn == TURNS - 1:
            break
    turns.append(Turn("sold" if said == "sold" else None, tuple(ending(known, said == "sold").tolist())))
    return Conversation(name, tuple(turns), f"customer-{name}", policy_version="any")


def facts_known(talk: Conversation, turn: int) -> Known:
    """What the customer has told before a turn."""
    told = {turn.customer_message for turn in talk.turns[: turn + 1]}
    room, budget, date = (f"my {fact} is set" in told for fact in FACTS)
    return room, budget, date
