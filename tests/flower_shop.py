"""A simulated business as a user would write it: a florist, to whom the occasion should be told before the offer."""

from __future__ import annotations

import random
from collections.abc import Sequence

from iterative_ppo.mdp.conversation import State, Suggestion, Turn

ASK, OFFER, CHAT = "What is the occasion?", "I would take the red roses.", "Nice weather today."
OUTCOMES = 2  # order, and whether it was a large one


class Order:
    def __init__(self, rng: random.Random) -> None:
        self.rng, self.turns, self.closed, self.told = rng, list[Turn](), False, False
        self.message = "I need flowers."

    @property
    def state(self) -> State:
        return State(tuple(self.turns), self.message)

    def step(self, suggestion: Suggestion) -> None:
        sent = suggestion.text or CHAT
        self.turns.append(Turn(self.message, (0.0,) * OUTCOMES, suggestion, sent, "verbatim"))
        if sent == OFFER and self.rng.random() < (0.9 if self.told else 0.2):
            self.turns.append(Turn("I take them.", (1.0, float(self.told))))
            self.closed = True
        elif len(self.turns) >= 4:
            self.turns.append(Turn(None, (0.0,) * OUTCOMES))
            self.closed = True
        else:
            self.told = self.told or sent == ASK
            self.message = "It is a birthday." if sent == ASK else "Hm."


class Apprentice:
    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def sample(self, states: Sequence[State], seed: int) -> list[Suggestion]:
        return [Suggestion(self.rng.choice((ASK, OFFER, CHAT)), "suggested") for _ in states]


class Florist:
    def start(self, conversations: int, seed: int) -> list[Order]:
        return [Order(random.Random(f"{seed}:{k}")) for k in range(conversations)]

    def business_of(self, k: int) -> str:
        return "florist"

    def script(self, seed: int) -> Apprentice:
        return Apprentice(seed)


class Unscripted(Florist):
    script = None  # type: ignore[assignment]


class Closed:
    def business_of(self, k: int) -> str:
        return "nobody"
