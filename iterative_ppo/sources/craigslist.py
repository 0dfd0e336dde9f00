"""CraigslistBargain: two people haggle over a second-hand good; the seller is the agent. Nothing was suggested.

Source: https://github.com/rishabhjoshi/DialoGraph_ICLR21 (Apache-2.0), from He, Chen, Balakrishnan and Liang 2018,
https://arxiv.org/abs/1808.09637.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from iterative_ppo.errors import SourceError
from iterative_ppo.mdp.conversation import Adoption, Conversation, Suggestion
from iterative_ppo.sources.log import (
    BadDialogueError,
    ImportedLog,
    RawDialogue,
    Said,
    collect,
    files_in,
    joined,
    need,
    read_json,
    short,
    turns_of,
    unix_time,
)

ROLES = ["buyer", "seller"]
CLOSING = {"accept", "reject", "quit"}


def import_craigslist(path: Path) -> ImportedLog:
    """Import the JSON file of a split, or a folder that holds exactly one.

    This is the auto-response setting of the paper's section 2.3: c_i is what the buyer did, m_i what the seller did,
    and a_i := m_i. An event that is no message is rendered (`<offer $50.0>`, `<accept>`, `<reject>`, `<quit>`).
    The outcome is 1 where it was sold, at the last accept; where that is the seller's own, at the buyer's turn
    before it, so that the accept that closes a sale is no action. What was not sold ends with the first accept,
    reject or quit. The context is what the seller sees: title, category, list price and the seller's own target.

    The log names no people. `customer_id` is the post that the two haggle over, the unit to split by, because up to
    four dialogues share a post, its prices and its text; `business_id` is None.

    Raises SourceError where the file is absent, damaged, empty or no list of dialogues.
    """
    file = _file(path)
    dialogues = read_json(file)
    if not isinstance(dialogues, list) or not dialogues:
        raise SourceError(f"{file}: expected a list of dialogues, found {short(dialogues)}; restore the file")
    raws = [RawDialogue(file, row, content) for row, content in enumerate(dialogues, start=1)]
    return collect(raws, "uuid", _conversation)


def _file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = files_in(path, ".json")
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:5])
        raise SourceError(f"{path}: expected exactly one .json file, found {len(files)} ({names}); name one of them")
    return files[0]


def _conversation(dialogue: Any) -> Conversation:
    name = need(dialogue, "uuid", str)
    post = str(need(dialogue, "scenario.post_id", (str, int)))
    sides = _sides(dialogue)
    said = _said(need(dialogue, "events", list), [role for role, _ in sides])
    sold = _sold(dialogue)
    turns = turns_of(_until_closed(said, sold), sold, _action)
    return Conversation(name, turns, customer_id=post, context=_context(dict(sides)["seller"]))


def _sides(dialogue: Any) -> list[tuple[str, Any]]:
    """Role and knowledge of agent 0 and of agent 1."""
    knowledge = need(dialogue, "scenario.kbs", list)
    roles = [need(one, "personal.Role", str, within=f"scenario.kbs[{agent}].") for agent, one in enumerate(knowledge)]
    if sorted(roles) != ROLES:
        raise BadDialogueError(f"expected one buyer and one seller, found {short(roles)}", "scenario.kbs")
    return list(zip(roles, knowledge, strict=True))


def _sold(dialogue: Any) -> bool:
    reward = need(dialogue, "outcome.reward", (int, float))
    if reward not in (0, 1):
        raise BadDialogueError(f"expected 0 or 1, found {short(reward)}", "outcome.reward")
    return bool(reward)


def _said(events: Sequence[Any], roles: Sequence[str]) -> list[Said]:
    said: list[Said] = []
    latest: datetime | None = None
    for number, event in enumerate(events):
        place = f"events[{number}]."
        agent = need(event, "agent", int, within=place)
        if agent not in range(len(roles)):
            raise BadDialogueError(f"expected agent 0 or 1, found {short(agent)}", f"{place}agent")
        time = unix_time(event.get("time"), f"{place}time")
        if time and latest and time < latest:
            raise BadDialogueError("earlier than the event before it", f"{place}time")
        latest = time or latest
        said.append(Said(roles[agent] == "buyer", _text(event, place), time, event))
    return said


def _text(event: Mapping[str, Any], place: str) -> str:
    action = need(event, "action", str, within=place)
    if action == "message":
        text: str = need(event, "data", str, within=place)
        return text
    if action == "offer":
        data = event.get("data")
        price = data.get("price") if isinstance(data, Mapping) else None
        return "<offer>" if price is None else f"<offer ${price}>"
    if action not in CLOSING:
        raise BadDialogueError(f"unknown action {short(action)}", f"{place}action")
    return f"<{action}>"


def _until_closed(said: Sequence[Said], sold: bool) -> list[Said]:
    if not sold:
        closing = (i for i, one in enumerate(said) if one.event["action"] in CLOSING)
        return list(said[: next(closing, len(said)) + 1])
    accepts = [i for i, one in enumerate(said) if one.event["action"] == "accept"]
    if not accepts:
        raise BadDialogueError("sold, but nobody accepted, so the turn of the sale is unknown", "events")
    # Where both accept, a first accept by the seller is often of the seller's own offer: the second one seals it.
    return list(said[: accepts[-1] + said[accepts[-1]].by_customer])


def _action(answer: list[Said]) -> tuple[Suggestion, Adoption | None]:
    return Suggestion(joined(answer), "suggested"), "verbatim"


def _context(seller: Any) -> str:
    within = "scenario.kbs[seller]."
    title, category = (need(seller, f"item.{key}", str, within=within) for key in ("Title", "Category"))
    price = need(seller, "item.Price", (int, float), within=within)
    target = need(seller, "personal.Target", (int, float), within=within)
    return f"{title} (category {category}), list price ${price}, the seller hopes for ${target}"
