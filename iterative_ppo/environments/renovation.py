"""The paper's own example (section 2.2): a renovation business, its customers, and an assistant that suggests.

A customer has hidden needs (room, budget), patience and tone. A business representative sends the suggestion, edits it
or writes something else, by how acceptable it looks to them, which is not how well it sells. A purchase needs the room
and the budget to have been told before the matching offer, within the customer's patience.

The customer is one explicit distribution over replies, so that the posterior of the hidden state given a history is
exact. The hidden state serves evaluation only; a `State` holds nothing but what was said.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise, product

from iterative_ppo.environments.phrases import (
    EDIT_PREFIX,
    ROOMS,
    TIERS,
    TONES,
    Act,
    business_phrases,
    customer_phrases,
    openings,
    parse,
)
from iterative_ppo.mdp.conversation import Adoption, State, Suggestion, Turn

OUTCOMES = {"purchase": 1.0}
PATIENCE = (3, 4, 5, 6)
NAMES_ROOM = 0.3
INTERJECTS = 0.16
BUYS = 0.92
LEAVES = 0.02
BUSINESSES = 20


@dataclass(frozen=True, slots=True)
class Hidden:
    """What only the customer knows."""

    room: str
    tier: str
    patience: int
    tone: str


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the conversation stands, for the customer: what was told, what is pending, how annoyed they are."""

    told_room: bool = False
    told_budget: bool = False
    pending: str | None = None
    annoyance: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """A customer's reaction; `kind` is None where they leave without a word."""

    kind: str | None
    interjection: str | None
    progress: Progress

    @property
    def bought(self) -> bool:
        return self.kind == "buys"


@cache
def all_hidden() -> tuple[Hidden, ...]:
    """Every hidden state; the prior is uniform."""
    return tuple(Hidden(*values) for values in product(ROOMS, TIERS, PATIENCE, TONES))


@cache
def replies(hidden: Hidden, progress: Progress, act: Act) -> tuple[tuple[float, Reply], ...]:
    """The customer's kernel: (probability, reply) for all that can follow a business message."""
    kind, after, cost = _reaction(hidden, progress, act)
    outcomes: list[tuple[float, Reply]] = [(LEAVES, Reply(None, None, progress))]
    stays = 1.0 - LEAVES
    if kind == "buys":
        outcomes.append((stays * BUYS, Reply("buys", None, after)))
        kind, cost, stays = "not_now", 2, stays * (1.0 - BUYS)
    after = replace(after, annoyance=after.annoyance + cost)
    if after.annoyance > hidden.patience:
        return (*outcomes, (stays, Reply(None, None, after)))
    if cost or after.pending:
        return (*outcomes, (stays, Reply(kind, None, after)))
    for interjection in ("question", "thinking"):
        outcomes.append((stays * INTERJECTS, Reply(kind, interjection, replace(after, pending=interjection))))
    return (*outcomes, (stays * (1.0 - 2 * INTERJECTS), Reply(kind, None, after)))


def _reaction(hidden: Hidden, progress: Progress, act: Act) -> tuple[str, Progress, int]:
    """(kind of reply, progress after it, cost in patience) before chance has its say."""
    if act.kind == "unclear":
        return "confused", progress, 2
    if progress.pending == "question":
        done = act.kind == "answer"
        return ("answered", replace(progress, pending=None), 0) if done else ("still_asking", progress, 2)
    if progress.pending == "thinking":
        done = act.kind == "wait"
        return ("back", replace(progress, pending=None), 0) if done else ("still_thinking", progress, 2)
    if act.kind == "ask_room":
        told = ("already_said", progress, 1)
        return told if progress.told_room else ("tells_room", replace(progress, told_room=True), 0)
    if act.kind == "ask_budget":
        told = ("already_said", progress, 1)
        return told if progress.told_budget else ("tells_budget", replace(progress, told_budget=True), 0)
    if act.kind == "offer":
        return _reaction_to_offer(hidden, progress, act)
    return "chats_on", progress, 2 if hidden.tone == "brief" else 1


def _reaction_to_offer(hidden: Hidden, progress: Progress, act: Act) -> tuple[str, Progress, int]:
    if not (progress.told_room and progress.told_budget):
        return "too_early", progress, 2
    if (act.room, act.tier) != (hidden.room, hidden.tier):
        return "wrong_offer", progress, 2
    return "buys", progress, 0


def posterior(state: State) -> dict[tuple[Hidden, Progress], float]:
    """P(hidden, progress | what was said): exact, by running the customer's kernel along the history.

    Evaluation only. Raises ValueError where no hidden state can have said this.
    """
    turns = [*state.history, Turn(state.customer_message)]
    weights = {}
    for hidden in all_hidden():
        for names_room in (False, True):
            said = openings(hidden.tone, hidden.room, names_room)
            if turns[0].customer_message in said:
                prior = (NAMES_ROOM if names_room else 1 - NAMES_ROOM) / len(said)
                weights[hidden, Progress(told_room=names_room)] = prior
    for turn, following in pairwise(turns):
        weights = _filtered(weights, parse(turn.business_message or ""), following.customer_message)
    total = sum(weights.values())
    if not total:
        raise ValueError("no customer of this world says that")
    return {key: weight / total for key, weight in weights.items()}


def _filtered(
    weights: dict[tuple[Hidden, Progress], float], act: Act, said: str | None
) -> dict[tuple[Hidden, Progress], float]:
    after: dict[tuple[Hidden, Progress], float] = {}
    for (hidden, progress), weight in weights.items():
        for chance, reply in replies(hidden, progress, act):
            wordings = _wordings(hidden, reply)
            if said in wordings:
                key = hidden, reply.progress
                after[key] = after.get(key, 0.0) + weight * chance / len(wordings)
    return after


def _wordings(hidden: Hidden, reply: Reply) -> tuple[str | None, ...]:
    if reply.kind is None:
        return (None,)
    return customer_phrases(reply.kind, reply.interjection, hidden.tone, hidden.room, hidden.tier)


# (verbatim, edited) probabilities of a representative who likes friendly words more than pointed questions.
_TASTE = {
    "chat": (0.88, 0.08),
    "wait": (0.60, 0.20),
    "ask_room": (0.62, 0.20),
    "ask_budget": (0.48, 0.22),
    "offer": (0.55, 0.20),
    "answer": (0.05, 0.05),
    "unclear": (0.08, 0.02),
}
_PREMATURE_OFFER = (0.15, 0.10)
_OWN_WORDS = (("chat", 0.5), ("ask_room", 0.25), ("ask_budget", 0.15), ("wait", 0.1))


def send(suggestion: Suggestion, progress: Progress, rng: random.Random) -> tuple[str, Adoption | None]:
    """P(m | s, a): what the representative sends, and how the suggestion fared (None where there was none)."""
    if suggestion.status != "suggested" or not suggestion.text:
        return _own_message(progress, rng), None
    act = parse(suggestion.text)
    verbatim, edited = _TASTE[act.kind]
    if act.kind == "offer" and not (progress.told_room and progress.told_budget):
        verbatim, edited = _PREMATURE_OFFER
    draw = rng.random()
    if draw < verbatim:
        return suggestion.text, "verbatim"
    if draw < verbatim + edited and act.kind != "unclear":
        return EDIT_PREFIX + rng.choice(business_phrases(act)), "edited"
    return _own_message(progress, rng), "rejected"


def _own_message(progress: Progress, rng: random.Random) -> str:
    """The representative knows the papers, so answers questions well; otherwise writes much as the old habits go."""
    if progress.pending == "question":
        kind = "answer"
    else:
        kind = rng.choices([k for k, _ in _OWN_WORDS], [w for _, w in _OWN_WORDS])[0]
    return rng.choice(business_phrases(Act(kind)))


class Session:
    """One conversation under way. `state` is all that a policy may see."""

    def __init__(
        self,
        hidden: Hidden,
        progress: Progress,
        history: tuple[Turn, ...],
        message: str,
        rng: random.Random,
        max_business_turns: int,
    ) -> None:
        self._hidden, self._progress, self._rng = hidden, progress, rng
        self._max = max_business_turns
        self.turns: list[Turn] = list(history)
        self._message: str | None = message
        self.closed = False

    @property
    def state(self) -> State:
        assert self._message is not None
        return State(tuple(self.turns), self._message)

    def step(self, suggestion: Suggestion) -> None:
        """The representative reacts to the suggestion, the customer to what was sent; closes the session at the end."""
        sent, adoption = send(suggestion, self._progress, self._rng)
        self.turns.append(Turn(self._message, (0.0,), suggestion, sent, adoption))
        choices = replies(self._hidden, self._progress, parse(sent))
        reply = self._rng.choices([r for _, r in choices], [p for p, _ in choices])[0]
        self._progress = reply.progress
        self._message = self._rng.choice(_wordings(self._hidden, reply))
        if reply.bought:
            self._close(Turn(self._message, (1.0,)))
        elif self._message is None or len(self.turns) >= self._max:
            self._close(Turn(None, (0.0,)))

    def _close(self, last: Turn) -> None:
        self.turns.append(last)
        self.closed = True


@dataclass(frozen=True, slots=True)
class Renovation:
    """The environment: opens conversations that a policy then advances together."""

    max_business_turns: int = 8

    def start(self, conversations: int, seed: int) -> list[Session]:
        """New customers. Session k of a seed has the same customer and the same luck whatever the policy does."""
        sessions = []
        for k in range(conversations):
            rng = random.Random(f"{seed}:{k}")
            hidden = rng.choice(all_hidden())
            names_room = rng.random() < NAMES_ROOM
            message = rng.choice(openings(hidden.tone, hidden.room, names_room))
            progress = Progress(told_room=names_room)
            sessions.append(Session(hidden, progress, (), message, rng, self.max_business_turns))
        return sessions

    def resume(self, state: State, sessions: int, seed: int) -> list[Session]:
        """Counterfactual futures of one state, the hidden state drawn from its exact posterior. Evaluation only."""
        belief = posterior(state)
        rng = random.Random(f"resume:{seed}")
        drawn = rng.choices(list(belief), list(belief.values()), k=sessions)
        return [
            Session(
                hidden,
                progress,
                state.history,
                state.customer_message,
                random.Random(rng.random()),
                self.max_business_turns,
            )
            for hidden, progress in drawn
        ]

    def business_of(self, k: int) -> str:
        """The business that the k-th conversation belongs to."""
        return f"business-{k % BUSINESSES:02d}"


class Script:
    """A hand-written agent: with probability `skill` it does the right thing, otherwise something habitual.

    Skill 1 is the oracle of this world (it sees only what was said); a low skill is the mediocre agent whose
    conversations pi_0 is fine-tuned on.
    """

    def __init__(self, skill: float, seed: int = 0) -> None:
        self.skill = skill
        self._rng = random.Random(f"script:{skill}:{seed}")

    def sample(self, states: Sequence[State], seed: int = 0) -> list[Suggestion]:
        return [self._suggest(state) for state in states]

    def _suggest(self, state: State) -> Suggestion:
        known = believed(state)
        act = right_act(known) if self._rng.random() < self.skill else self._habit(known)
        if act is None:
            return Suggestion("", "abstained")
        return Suggestion(self._rng.choice(business_phrases(act)), "suggested")

    def _habit(self, known: Believed) -> Act | None:
        kind = self._rng.choices(
            ["chat", "ask_room", "ask_budget", "offer", "wait", "abstain"], [0.36, 0.14, 0.12, 0.18, 0.12, 0.08]
        )[0]
        if kind == "abstain":
            return None
        if kind == "offer":  # pushy: as soon as the room is known, whatever the budget
            return Act("offer", known.room, known.tier or self._rng.choice(TIERS)) if known.room else Act("chat")
        return Act(kind)


@dataclass(frozen=True, slots=True)
class Believed:
    """What an attentive reader of the conversation knows."""

    room: str | None
    tier: str | None
    pending: str | None


def believed(state: State) -> Believed:
    """Room, budget and pending request, read off the exact posterior where it is certain."""
    belief = posterior(state)
    rooms = {hidden.room for hidden, progress in belief if progress.told_room}
    tiers = {hidden.tier for hidden, progress in belief if progress.told_budget}
    pending = {progress.pending for _, progress in belief}
    return Believed(_only(rooms), _only(tiers), _only(pending))


def _only(values: set[str | None] | set[str]) -> str | None:
    return next(iter(values)) if len(values) == 1 else None


def right_act(known: Believed) -> Act | None:
    """What sells in this world; None is to abstain, because only the representative can answer questions."""
    if known.pending == "question":
        return None
    if known.pending == "thinking":
        return Act("wait")
    if known.room is None:
        return Act("ask_room")
    if known.tier is None:
        return Act("ask_budget")
    return Act("offer", known.room, known.tier)
