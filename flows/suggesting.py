"""`ippo suggest`: one conversation in JSON to one suggestion of a registered policy."""

from __future__ import annotations

import json
from typing import Any

from iterative_ppo.config import Config
from iterative_ppo.errors import SourceError
from iterative_ppo.mdp.conversation import ABSTAIN, MISSING, State, Suggestion, Turn, adoption_of


def read_state(text: str, where: str) -> State:
    """A state from JSON. Raises SourceError naming the message and the field."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise SourceError(f"{where}: not valid JSON ({error})") from None
    messages = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(messages, list) or not messages:
        raise SourceError(f'{where}: expected {{"messages": [{{"customer": "..."}}, ...]}}')
    turns, customer = [], None
    for number, message in enumerate(messages, start=1):
        place = f"{where}: message {number}"
        if customer is None:
            customer = _said(message, "customer", place)
        else:
            turns.append(_turn(customer, message, place))
            customer = None
    if customer is None:
        raise SourceError(f"{where}: the last message must be the customer's, there is nothing to answer")
    context = value.get("context")
    if context is not None and not isinstance(context, str):
        raise SourceError(f"{where}: context: expected text, got {type(context).__name__}")
    return State(tuple(turns), customer, context)


def _said(message: Any, who: str, place: str) -> str:
    said = message.get(who) if isinstance(message, dict) else None
    if not isinstance(said, str):
        raise SourceError(f'{place}: expected {{"{who}": "text"}}, got {json.dumps(message)[:80]}')
    return said


def _turn(customer: str, message: Any, place: str) -> Turn:
    sent = _said(message, "business", place)
    suggested = message.get("suggestion")
    if suggested is not None and not isinstance(suggested, str):
        raise SourceError(f"{place}: suggestion: expected text, got {type(suggested).__name__}")
    action = MISSING if suggested is None else Suggestion(suggested, "suggested") if suggested else ABSTAIN
    adoption = adoption_of(suggested, sent, 0.6) if suggested else None
    return Turn(customer, (), action, sent, adoption)


def suggestion_for(config: Config, state: State, alias: str, seed: int) -> dict[str, Any]:
    """The suggestion as JSON-able values, with the version that made it and its log-prob."""
    from iterative_ppo.learning.language_model import LanguagePolicy, threads
    from tasks import registry, tracking

    store = tracking.open_tracking(config)
    registry.recover(store, config.data.root)
    version = registry.resolve(store, alias)
    policy = LanguagePolicy.load(registry.fetch(store, registry.POLICY, version), device=config.runtime.device)
    with threads(config.runtime.threads):
        action = policy.sample([state], seed)[0]
    return {
        "suggestion": action.text,
        "abstained": action.status == "abstained",
        "policy_version": version,
        "logprob": action.logprob,
        "truncated_turns": policy.renderer.prompt(state).truncated_turns,
    }
