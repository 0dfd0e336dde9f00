"""STAR: a human wizard answers a human user, and may ask a model for suggestions, pick one, or type something else.

Source: https://github.com/RasaHQ/STAR (MIT), Mosig, Mehri and Kober 2020, https://arxiv.org/abs/2010.11853.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from iterative_ppo.errors import SourceError
from iterative_ppo.mdp.conversation import MISSING, Adoption, Conversation, Suggestion
from iterative_ppo.sources.log import (
    BadDialogueError,
    ImportedLog,
    RawDialogue,
    Said,
    SetAside,
    collect,
    exchanges,
    files_in,
    need,
    read_json,
    short,
    turns_of,
    unix_time,
)

ACTIONS = {
    "User": {"utter", "complete"},
    "Wizard": {"utter", "pick_suggestion", "request_suggestions", "query", "select_primary", "select_secondary"},
    "KnowledgeBase": {"return_item"},
    "UserGuide": {"instruct"},
}
SUCCESS = re.compile(r"reservation confirmed|ride booked|success?ful?ly scheduled", re.IGNORECASE)
# The templates say "{time:d} o'clock" where the wizard's screen showed the bare time, which has its own "pm".
SLOT = re.compile(r"\{(\w+)(?::\w+)?\}(?: o'clock)?")
CUSTOM = "custom"

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Responses:
    """Texts of the wizard's options: the task's template or, where it has none, what was sent when one was picked."""

    templates: Mapping[str, Mapping[str, str]]
    picked: Mapping[tuple[str, str], Counter[str]]

    def render(self, task: str, label: str, item: Any) -> str | None:
        """The text of an option, or None where no text of it is known.

        A slot is filled from the knowledge-base item that the wizard had in view (`doctor_name` from `DoctorName`,
        any `..._id` from `id`). A slot without a value becomes nothing, as on the wizard's screen.
        """
        template = self.templates.get(task, {}).get(label)
        if template is None:
            sent = self.picked.get((task, label))
            return min(sent, key=lambda text: (-sent[text], text)) if sent else None
        return SLOT.sub(lambda slot: _value(slot[1], item), template)


def import_star(path: Path) -> ImportedLog:
    """Import the folder that holds `dialogues/*.json` and `tasks/*/responses.json`.

    c_i: the user's messages; m_i: the wizard's answer; a_i: the first option that the wizard was shown, `missing`
    where the wizard sent own words, because those options were not logged. o = 1 at the user's message before the
    task's first success, and what follows is left out (`extra["dropped_turns"]` counts it). The context is the task's
    name. Instructions, scenario, questionnaires and the wizard's drafts are never read.

    Raises SourceError where the folders or a template file are absent or damaged. A damaged dialogue is set aside.
    """
    templates = _templates(path / "tasks")
    raws, unreadable = _read(files_in(path / "dialogues", ".json"))
    responses = Responses(templates, _picked(raw.content for raw in raws))
    log = collect(raws, "DialogueID", lambda content: _conversation(content, responses))
    return ImportedLog(log.conversations, [*unreadable, *log.set_aside])


def _templates(folder: Path) -> dict[str, dict[str, str]]:
    if not folder.is_dir():
        raise SourceError(f"{folder}: not there; source.path must be the folder that holds dialogues/ and tasks/")
    templates = {}
    for file in sorted(folder.glob("*/responses.json")):
        texts = read_json(file)
        if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
            raise SourceError(f"{file}: expected a mapping of option names to texts; restore the file")
        templates[file.parent.name] = texts
    return templates


def _read(files: Iterable[Path]) -> tuple[list[RawDialogue], list[SetAside]]:
    raws, unreadable = [], []
    for file in files:
        try:
            raws.append(RawDialogue(file, None, read_json(file)))
        except SourceError as error:
            reason = str(error)
            unreadable.append(SetAside(file.stem, file, None, None, reason.partition(": ")[2], reason))
    return raws, unreadable


def _picked(dialogues: Iterable[Any]) -> dict[tuple[str, str], Counter[str]]:
    picked: dict[tuple[str, str], Counter[str]] = {}
    for dialogue in dialogues:
        try:
            task, events = _task(dialogue), _events(dialogue)
        except BadDialogueError:
            continue  # reported when it is converted
        for event in events:
            if event["Action"] == "pick_suggestion":
                picked.setdefault((task, event["ActionLabel"]), Counter())[event["Text"]] += 1
    return picked


def _conversation(dialogue: Any, responses: Responses) -> Conversation:
    name = str(need(dialogue, "DialogueID", (int, str)))
    customer = need(dialogue, "AnonymizedUserWorkerID", str)
    business = need(dialogue, "AnonymizedWizardWorkerID", str)
    task, events = _task(dialogue), _events(dialogue)
    said = [_said(number, event) for number, event in enumerate(events, start=1)]
    if not any(one and one.by_customer for one in said):
        raise BadDialogueError("no user turn", "Events")
    end = next((i for i, event in enumerate(events) if _succeeded(event, task)), len(events))
    before, after = ([one for one in part if one] for part in (said[:end], said[end:]))
    turns = turns_of(before, end < len(events), lambda answer: _action(answer, task, responses))
    dropped = sum(bool(pair.customer) for pair in exchanges(after))
    context = task.replace("_", " ")
    return Conversation(name, turns, customer, business, context, extra={"dropped_turns": str(dropped)})


def _task(dialogue: Any) -> str:
    capabilities = need(dialogue, "Scenario.WizardCapabilities", list)
    if len(capabilities) != 1:
        raise BadDialogueError(f"expected one task, found {len(capabilities)}", "Scenario.WizardCapabilities")
    task: str = need(capabilities[0], "Task", str, within="Scenario.WizardCapabilities[0].")
    return task


def _events(dialogue: Any) -> list[Event]:
    events: list[Event] = need(dialogue, "Events", list)
    latest: datetime | None = None
    for row, event in enumerate(events, start=1):
        _check(event, row)
        time = unix_time(event.get("UnixTime"), "UnixTime", row)
        if time and latest and time < latest:
            raise BadDialogueError("earlier than the event before it", "UnixTime", row)
        latest = time or latest
    return events


def _check(event: Any, row: int) -> None:
    agent, action = need(event, "Agent", str, row), need(event, "Action", str, row)
    if agent not in ACTIONS:
        raise BadDialogueError(f"expected {', '.join(ACTIONS)}, found {short(agent)}", "Agent", row)
    if action not in ACTIONS[agent]:
        raise BadDialogueError(f"{agent} has no action {short(action)}", "Action", row)
    if action in {"utter", "pick_suggestion"}:
        need(event, "Text", str, row)
    if action == "pick_suggestion":
        need(event, "ActionLabel", str, row)
        options = need(event, "ActionLabelOptions", list, row)
        if not options or not all(isinstance(option, str) for option in options):
            raise BadDialogueError("expected names of options", "ActionLabelOptions", row)


def _said(row: int, event: Event) -> Said | None:
    if event["Action"] not in {"utter", "pick_suggestion"}:
        return None
    time = unix_time(event.get("UnixTime"), "UnixTime", row)
    return Said(event["Agent"] == "User", event["Text"], time, event)


def _succeeded(event: Event, task: str) -> bool:
    item = event.get("Item")
    if event["Action"] != "return_item" or event.get("APIName") != task or not isinstance(item, Mapping):
        return False
    return any(SUCCESS.search(str(item.get(key, ""))) for key in ("Message", "ReservationStatus"))


def _action(answer: Sequence[Said], task: str, responses: Responses) -> tuple[Suggestion, Adoption | None]:
    event = answer[0].event
    if event["Action"] == "utter":
        return MISSING, "rejected"  # own words after suggestions were shown
    if event["ActionLabel"] == CUSTOM:
        return MISSING, None  # no suggestion was shown
    first = event["ActionLabelOptions"][0]
    if event["ActionLabel"] == first:
        return Suggestion(event["Text"], "suggested"), "verbatim" if len(answer) == 1 else "edited"
    text = responses.render(task, first, event.get("PrimaryItem"))
    return (MISSING if text is None else Suggestion(text, "suggested")), "rejected"


def _value(slot: str, item: Any) -> str:
    known = {_snake(key): value for key, value in item.items()} if isinstance(item, Mapping) else {}
    value = known.get(slot, known.get("id") if slot.endswith("_id") else None)
    return "" if value is None else str(value)


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
