"""`ippo suggest`: one conversation in JSON to one suggestion of a registered policy."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from iterative_ppo.config import Config
from iterative_ppo.errors import ConfigError, SourceError, StoreError, did_you_mean
from iterative_ppo.mdp.conversation import ABSTAIN, MISSING, State, Suggestion, Turn, adoption_of
from iterative_ppo.sources.log import encodable, short

if TYPE_CHECKING:
    from tasks.assignment import Assigned
    from tasks.tracking import Tracking


def read_state(text: str, where: str) -> State:
    """A state from JSON. Raises SourceError naming the message and the field."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{where}: not valid JSON ({error})") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise SourceError(f'{where}: expected {{"messages": [{{"customer": "..."}}, ...]}}')
    _check_keys(value, ("context", "messages"), where)
    turns, customer = [], None
    for number, message in enumerate(messages, start=1):
        place = f"{where}: message {number}"
        if customer is None:
            customer = _said(message, "customer", place)
            _check_keys(message, ("customer",), place)
        else:
            turns.append(_turn(customer, message, place))
            customer = None
    if customer is None:
        raise SourceError(f"{where}: the last message must be the customer's, there is nothing to answer")
    return State(tuple(turns), customer, _optional(value.get("context"), f"{where}: context"))


def _check_keys(value: dict[str, Any], known: tuple[str, ...], place: str) -> None:
    """What is not read is refused: a word that nobody knows may be one that somebody meant."""
    if unknown := [key for key in value if key not in known]:
        hint = did_you_mean(unknown[0], known)
        raise SourceError(f"{place}: unknown key {unknown[0]!r}{hint}; expected {', '.join(known)}")


def _said(message: Any, who: str, place: str) -> str:
    said = message.get(who) if isinstance(message, dict) else None
    if not isinstance(said, str):
        raise SourceError(f'{place}: expected {{"{who}": "text"}}, got {json.dumps(message)[:80]}')
    return _encodable(said, f"{place}: {who}")


def _optional(said: Any, place: str) -> str | None:
    if said is not None and not isinstance(said, str):
        raise SourceError(f"{place}: expected text, got {type(said).__name__}")
    return _encodable(said, place) if said else said


def _encodable(said: str, place: str) -> str:
    if not encodable(said):
        raise SourceError(f"{place}: expected text, found half a character in {short(said)}; send it whole")
    return said


def _turn(customer: str, message: Any, place: str) -> Turn:
    sent = _said(message, "business", place)
    _check_keys(message, ("business", "suggestion"), place)
    suggested = _optional(message.get("suggestion"), f"{place}: suggestion")
    action = MISSING if suggested is None else Suggestion(suggested, "suggested") if suggested else ABSTAIN
    adoption = adoption_of(suggested, sent, 0.6) if suggested else None
    return Turn(customer, (), action, sent, adoption)


def time_of(text: str) -> datetime:
    """A moment such as 2026-03-02T09:30:00+01:00. Raises ConfigError for another form, or without its offset."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise ConfigError(f"--began {text}: expected a time with its offset, such as 2026-03-02T09:30:00+01:00")
    return moment


def answerer(config: Config, store: Tracking, unit: str, began: datetime) -> Assigned:
    """Who answers this conversation, or business: the champion, or while an A/B test runs the arm of its hash.

    Raises StoreError where the data root is not that of the store's A/B test.
    """
    from flows.champions import end_void_test
    from tasks import registry
    from tasks.assignment import assigned
    from tasks.state import load_state, state_file

    tested = registry.challenger(store)
    if tested is not None and not state_file(config.data.root).exists():
        raise StoreError(
            f"data.root {config.data.root}: has no state.json, but an A/B test of the store tests policy version "
            f"{tested}; name the data.root of its nights, so that --unit keeps its arm"
        )
    state = load_state(config.data.root)
    end_void_test(config, store, state)  # a challenger that was deleted meets nobody
    return assigned(config, state, registry.resolve(store, "champion"), unit, began)


def suggestion_for(
    config: Config, state: State, alias: str, seed: int, unit: str | None = None, began: datetime | None = None
) -> dict[str, Any]:
    """The suggestion as JSON-able values, with the version that made it and its log-prob.

    Args:
        unit: id of the conversation, or business, whose arm of a running A/B test answers; None leaves that to `alias`.
        began: when the conversation began; None means now, which only a first message can.

    Raises ConfigError where a unit's arm cannot be told.
    """
    from flows.champions import settle
    from iterative_ppo.learning.language_model import LanguagePolicy
    from iterative_ppo.learning.runtime import computing
    from tasks import registry, tracking
    from tasks.audit import audit_file

    store = tracking.open_tracking(config)
    if audit_file(config.data.root).exists():  # who only reads makes no trail where there is none
        settle(config, store, "ippo suggest")
    if unit is not None and alias != "champion":
        raise ConfigError(f"--alias {alias} and --unit {unit}: name either, an A/B test assigns by unit")
    if unit is not None and began is None and state.history:
        raise ConfigError(
            f"--unit {unit}: the conversation is under way; say with --began when it began, so that it keeps its arm"
        )
    who = answerer(config, store, unit, began or datetime.now(UTC)) if unit is not None else None
    version = who.version if who else registry.resolve(store, alias)
    with computing(config.runtime):
        policy = LanguagePolicy.load(registry.fetch(store, registry.POLICY, version), device=config.runtime.device)
        persona = who.persona if who else None
        speaker = policy if persona is None else policy.led_by(config.exploration.personas[persona])
        action, seen = speaker.sample([state], seed)[0], speaker.renderer.prompt(state)
    return {
        "suggestion": action.text,
        "abstained": action.status == "abstained",
        "policy_version": version,
        "arm": who.arm if who else None,
        "persona": persona,
        "logprob": action.logprob,
        "truncated_turns": seen.truncated_turns,
        "cut_tokens": seen.cut_tokens,
    }
