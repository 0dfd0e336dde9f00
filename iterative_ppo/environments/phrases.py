"""What people in the renovation world say: every act of the business and every reply of a customer, in paraphrases."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product

ROOMS = ("kitchen", "bathroom", "bedroom", "basement")
TIERS = ("basic", "standard", "premium")
AMOUNTS = {"basic": "five thousand", "standard": "ten thousand", "premium": "twenty thousand"}
TONES = ("brief", "warm")


@dataclass(frozen=True, slots=True)
class Act:
    """What a business message does: chat, ask_room, ask_budget, wait, answer, offer (of a room and tier), unclear."""

    kind: str
    room: str | None = None
    tier: str | None = None


UNCLEAR = Act("unclear")

BUSINESS: dict[str, tuple[str, ...]] = {
    "chat": (
        "Thanks for reaching out to us!",
        "We love helping people with their homes.",
        "It is great to hear from you!",
    ),
    "ask_room": (
        "Which room are you thinking about?",
        "What part of your home should we look at?",
        "Could you tell me which room it is?",
    ),
    "ask_budget": (
        "What budget do you have in mind?",
        "How much would you like to spend?",
        "Could you tell me your budget?",
    ),
    "wait": (
        "No problem, take your time.",
        "Of course, let me know when you are ready.",
    ),
    "answer": (
        "Yes, we are insured and have all the papers.",
        "Our team has been doing this for twelve years.",
    ),
    "offer": (
        "We can do your {room} with our {tier} package.",
        "I suggest the {tier} package for your {room}.",
        "For your {room} the {tier} package is a good fit.",
    ),
}

OPENINGS: dict[str, tuple[str, ...]] = {
    "brief": ("Hi, need some work done.", "Renovation, how does it work?"),
    "warm": (
        "Hello there, I am thinking about updating my home.",
        "Hi! I saw your ad and would love some changes at home.",
    ),
}
OPENINGS_WITH_ROOM: dict[str, tuple[str, ...]] = {
    "brief": ("Hi, need work on my {room}.",),
    "warm": ("Hello there, I would love to update my {room}.",),
}

REPLIES: dict[str, dict[str, tuple[str, ...]]] = {
    "tells_room": {
        "brief": ("The {room}.", "It is my {room}."),
        "warm": ("It would be my {room}, thank you.", "We want to update the {room}!"),
    },
    "tells_budget": {
        "brief": ("About {amount}.", "Up to {amount}."),
        "warm": ("We can spend about {amount}, I think.", "I was hoping for {amount} or so."),
    },
    "chats_on": {
        "brief": ("OK.", "Sure. So?"),
        "warm": ("That is nice to hear!", "Great, so what happens now?"),
    },
    "already_said": {
        "brief": ("I said that.",),
        "warm": ("I think I told you that before.",),
    },
    "still_asking": {
        "brief": ("You did not answer me.",),
        "warm": ("Sorry, but could you answer my question?",),
    },
    "still_thinking": {
        "brief": ("I need time.",),
        "warm": ("Please, I still need to talk about it at home.",),
    },
    "answered": {
        "brief": ("OK, good.",),
        "warm": ("Thank you, that is good to know!",),
    },
    "back": {
        "brief": ("OK, go on.",),
        "warm": ("Thanks for waiting, we can go on now.",),
    },
    "too_early": {
        "brief": ("You do not know what I need.",),
        "warm": ("Hm, you do not really know what we need yet.",),
    },
    "wrong_offer": {
        "brief": ("That is not it.",),
        "warm": ("I am afraid that is not what we are looking for.",),
    },
    "not_now": {
        "brief": ("Not sure.",),
        "warm": ("It sounds good, but I am not quite sure.",),
    },
    "confused": {
        "brief": ("What?",),
        "warm": ("Sorry, I do not understand.",),
    },
    "buys": {
        "brief": ("Deal.", "OK, book it."),
        "warm": ("Wonderful, please book it for us!", "Yes, we will take it, thank you!"),
    },
}

INTERJECTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "question": {"brief": ("Are you insured?",), "warm": ("By the way, how long have you been doing this?",)},
    "thinking": {"brief": ("Let me think.",), "warm": ("I have to talk to my partner first.",)},
}


@cache
def business_phrases(act: Act) -> tuple[str, ...]:
    """All wordings of an act. An unclear act has none."""
    return tuple(text.format(room=act.room, tier=act.tier) for text in BUSINESS.get(act.kind, ()))


@cache
def acts() -> tuple[Act, ...]:
    """Every act that the grammar knows."""
    plain = [Act(kind) for kind in BUSINESS if kind != "offer"]
    return (*plain, *(Act("offer", room, tier) for room, tier in product(ROOMS, TIERS)))


@cache
def _act_by_text() -> dict[str, Act]:
    return {text: act for act in acts() for text in business_phrases(act)}


def parse(text: str) -> Act:
    """The act of a business message; unclear outside the grammar. An editor's "Sure! " is looked through."""
    return _act_by_text().get(" ".join(text.removeprefix(EDIT_PREFIX).split()), UNCLEAR)


EDIT_PREFIX = "Sure! "


@cache
def customer_phrases(kind: str, interjection: str | None, tone: str, room: str, tier: str) -> tuple[str, ...]:
    """All wordings of a customer's reply, with the question or pause that comes with it, if any."""
    main = [text.format(room=room, amount=AMOUNTS[tier]) for text in REPLIES[kind][tone]]
    if interjection is None:
        return tuple(main)
    return tuple(f"{first} {second}" for first, second in product(main, INTERJECTIONS[interjection][tone]))


@cache
def openings(tone: str, room: str, names_room: bool) -> tuple[str, ...]:
    """All first messages of a customer."""
    return tuple(text.format(room=room) for text in (OPENINGS_WITH_ROOM if names_room else OPENINGS)[tone])
