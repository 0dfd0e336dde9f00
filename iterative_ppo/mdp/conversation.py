"""The Suggested Response MDP's nouns: Turn, State (Eq. 1 of the paper) and Conversation."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from datetime import datetime
from difflib import SequenceMatcher
from typing import Literal

SuggestionStatus = Literal["suggested", "abstained", "missing"]
Adoption = Literal["verbatim", "edited", "rejected", "no_reply"]
Part = Literal["fit", "evidence"]

REPORTED = "reported"
"""The origin of an outcome that the log states, of none too; mdp/labels.py knows the others."""

SUGGESTION_STATUSES: tuple[str, ...] = ("suggested", "abstained", "missing")
ADOPTIONS: tuple[str, ...] = ("verbatim", "edited", "rejected", "no_reply")
PARTS: tuple[str, ...] = ("fit", "evidence")


@dataclass(frozen=True, slots=True)
class Suggestion:
    """An action a_i: a text, or the decision to abstain (the paper's empty a_i), or one that was never logged."""

    text: str | None
    status: SuggestionStatus
    logprob: float | None = None


ABSTAIN = Suggestion("", "abstained")
MISSING = Suggestion(None, "missing")


@dataclass(frozen=True, slots=True)
class Turn:
    """(c_i, o_i, a_i, m_i): the customer's message, outcome so far, the suggestion, and what the business sent.

    The last turn of a conversation is terminal: it has no suggestion (`suggestion is None`) and no business message,
    and either its outcome is positive or `customer_message` is None, because somebody stopped.
    """

    customer_message: str | None
    outcomes: tuple[float, ...] = ()
    suggestion: Suggestion | None = None
    business_message: str | None = None
    adoption: Adoption | None = None
    timestamp: datetime | None = None

    @property
    def terminal(self) -> bool:
        return self.suggestion is None


@dataclass(frozen=True, slots=True)
class State:
    """s_i of Eq. 1: the turns before i, then c_i. Outcomes before the terminal state are 0 and not repeated here."""

    history: tuple[Turn, ...]
    customer_message: str
    context: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """A closed conversation: turns 1..T+1, the last one terminal, with the ids that evaluation groups by."""

    conversation_id: str
    turns: tuple[Turn, ...]
    customer_id: str
    business_id: str | None = None
    context: str | None = None
    policy_version: str | None = None
    arm: str | None = None
    persona: str | None = None
    outcome_origin: str | None = REPORTED
    """Who says what came of it; None where nobody does, and the outcome is 0 until it is labelled."""
    extra: dict[str, str] = field(default_factory=dict)

    def state(self, i: int) -> State:
        """State before the i-th action (0-based). Raises IndexError past the last action."""
        turn = self.turns[i]
        if turn.terminal or turn.customer_message is None:
            raise IndexError(f"{self.conversation_id}: turn {i + 1} is terminal and has no state to act in")
        return State(self.turns[:i], turn.customer_message, self.context)


def adoption_of(suggestion: str, sent: str | None, edited_at_least: float) -> Adoption:
    """Adoption by similarity, where the log has no event of its own: ratio of matching characters, in [0, 1]."""
    if sent is None:
        return "no_reply"
    if same_words(suggestion, sent):
        return "verbatim"
    a, b = _words(suggestion), _words(sent)
    return "edited" if SequenceMatcher(None, a, b, autojunk=False).ratio() >= edited_at_least else "rejected"


def same_words(one: str, other: str) -> bool:
    """Whether two texts are the same but for spaces and capitals."""
    return one == other or _words(one) == _words(other)


def _words(text: str) -> str:
    return " ".join(text.split()).casefold()


def part_of(unit: str, evidence_share: float) -> Part:
    """The stable part of a unit (a customer or a business) by hash: `evidence` with probability `evidence_share`."""
    score = int.from_bytes(hashlib.sha256(f"part:{unit}".encode()).digest()[:8], "big") / 2**64
    return "evidence" if score < evidence_share else "fit"
