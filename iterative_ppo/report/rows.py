"""The report's tables and conversations, as the template shows them: everything is text by now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from iterative_ppo.evaluation.ab_test import p_in_words
from iterative_ppo.evaluation.doubts import doubts, label_doubts
from iterative_ppo.evaluation.gate import Decision
from iterative_ppo.mdp.labels import CLASSIFIER
from iterative_ppo.report import words
from iterative_ppo.report.customers import ADOPTIONS, Group
from iterative_ppo.report.record import RunRecord
from iterative_ppo.report.round_record import Example, Guarded, RoundRecord, Said

NO_SUGGESTION = "(no suggestion)"
RECENT = 5
CHANCE = "calibration_error_by_chance_95"
VERDICTS = {
    "test": ("good", "passed"),
    "promote": ("good", "promoted"),
    "reject": ("bad", "rejected"),
    "halt": ("bad", "halted"),
    "continue": ("open", "goes on"),
}


@dataclass(frozen=True)
class Pill:
    """A verdict in a word, and its colour."""

    text: str
    tone: str


def _pill(decision: Decision | None) -> Pill | None:
    if decision is None:
        return None
    tone, text = VERDICTS.get(decision.verdict, ("open", str(decision.verdict)))
    return Pill(text, tone)


def round_row(run: RunRecord, one: RoundRecord) -> dict[str, Any]:
    """One line of the table of rounds, with what unfolds below it."""
    q = one.q
    return {
        "number": one.number,
        "data": (one.data_md5 or "").removesuffix(".dir")[:8],
        "conversations": words.count(one.conversations),
        "quarantined": words.count(one.quarantined),
        "r2": words.number(q.get("r2")),
        "state_r2": words.number(q["state_only_r2"]) if "state_only_r2" in q else "",
        "auc": words.number(q.get("auc")),
        "calibration": words.number(q.get("calibration_error")),
        "chance": words.number(q[CHANCE]) if CHANCE in q else "",
        "kl": words.number(one.evidence.get("kl_challenger_champion"), 2),
        "gate": _pill(one.offline),
        "gain": words.points(one.test.gain) if one.test else words.NOTHING,
        "interval": _interval(one),
        "decision": _pill(one.decision) or _open(run, one),
        "summary": _summary(one),
        "why": list(_why(one)),
        "facts": list(_facts(one)),
    }


def _interval(one: RoundRecord) -> str:
    if one.test is None:
        return ""
    return f"{words.points_span(one.test.gain_low, one.test.gain_high)}, {p_in_words(one.test.p_value)}"


def _open(run: RunRecord, one: RoundRecord) -> Pill:
    """A round without an A/B decision: rejected before it, being tested, waiting, or still at work."""
    if one.offline is None:
        return Pill("in training", "open")
    if one.offline.verdict != "test":
        return Pill("not tested", "plain")
    if one.void:
        return Pill("test void", "plain")
    if run.phase == "approve":
        return Pill("awaits approval", "open")
    running = run.phase == "test" and not run.unmet
    return Pill("being tested" if running else "awaits A/B test", "open")


def _summary(one: RoundRecord) -> str:
    if one.challenger and one.champion:
        challenger, champion = words.policy(one.challenger), words.policy(one.champion)
        return f"{challenger.capitalize()}, from {champion}: reasons and facts"
    return "Reasons and facts"


def _why(one: RoundRecord) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    for heading, decision in (("Offline gate", one.offline), ("A/B test with customers", one.decision)):
        if decision and decision.reasons:
            yield heading, [words.reason(text) for text in decision.reasons]


def _facts(one: RoundRecord) -> Iterator[str]:
    yield from _improvement(one)
    if one.temperature is not None:
        yield f"Sampling temperature {one.temperature:g}; it is part of the policy"
    if "held_out_turns" in one.q:
        yield f"Q was judged on {words.count(one.q['held_out_turns'], 'turns')} that it had not seen"
    yield from (f"{doubt[0].upper()}{doubt[1:]}" for doubt in doubts(one.q))
    if "fit_effective_size" in one.q:
        worth = words.count(one.q["fit_effective_size"])
        yield f"The logged suggestions were worth {worth} of the policy's own (effective sample size)"
    if "held_out_nats_a_token" in one.distance:
        nats = words.number(one.distance["held_out_nats_a_token"], 2)
        made = "was cloned from a log" if one.distance.get("cloned", 1.0) else "is a base model, beside a log"
        yield f"The first policy {made}: {nats} nats a token on held-out actions"
        yield "The success in the log is of those who wrote it: how well the first policy does, only customers can tell"
    if one.origins:
        found = (f"{words.count(count)} {words.origin(origin)}" for origin, count in one.origins.items())
        yield f"Outcomes of its conversations: {', '.join(found)}"
    yield from _classifier(one.classifier)
    yield from _coverage(one.q)
    for reason, count in one.set_aside.items():
        yield f"Set aside at import, {words.count(count)}: {reason}"
    for reason, count in one.quarantine_reasons.items():
        yield f"Quarantined, {words.count(count)}: {reason}"
    if one.looks:
        shares = ", ".join(f"{fraction:.0%}" for fraction in one.looks)
        yield f"The A/B test was looked at {words.times(len(one.looks))}, at {shares} of its plan"
    if one.void:
        yield f"The A/B test ended without a verdict: {one.void}"
    if one.convergence:
        yield f"Converged: {one.convergence}"
    yield from one.warnings


def guesses(run: RunRecord) -> str:
    """What becomes of outcomes that a classifier said; empty where it said none."""
    said = any(origin.startswith(CLASSIFIER) for one in run.rounds for origin in one.origins)
    return "An outcome that only a classifier said counts as none, as in an A/B test." if said else ""


def _classifier(figures: Mapping[str, float]) -> Iterator[str]:
    """How good labels are, by outcome, and what gives cause for doubt."""
    for key, auc in figures.items():
        named = key.removesuffix("_auc")
        if named != key:
            held = words.count(figures.get("classifier_held_out"), "held-out conversations")
            told = f"AUC {words.number(auc)}, recall {words.number(figures.get(f'{named}_recall'))}"
            yield f"The classifier of “{named.removeprefix('classifier_')}” on {held}: {told}"
    yield from (f"{doubt[0].upper()}{doubt[1:]}" for doubt in label_doubts(figures))


def _coverage(q: Mapping[str, float]) -> Iterator[str]:
    """How many kinds of actions Q has seen in like states, with personas and without."""
    if "coverage_distinct_actions" not in q:
        return
    distinct, unseen = words.number(q["coverage_distinct_actions"], 1), words.percent(q["coverage_extrapolated"])
    own = q.get("coverage_distinct_actions_own")
    like = words.count(q.get("coverage_neighbours"), "like states")
    said = f"Among {like} Q saw {distinct} different suggestions; for {unseen} of the policy's own it extrapolates"
    alone = f" (without personas {words.number(own, 1)} and {words.percent(q.get('coverage_extrapolated_own'))})"
    yield said + (alone if own is not None else "")
    if "coverage_effective_size" in q:
        worth = words.count(q["coverage_effective_size"])
        turns = words.count(q.get("coverage_persona_turns"), "suggestions")
        yield f"Personas made {turns}, worth {worth} of the policy's own (effective sample size)"
    if "coverage_beyond_reach" in q:
        far = words.percent(q["coverage_beyond_reach"])
        yield f"{far} of the states that others reached are farther from the policy's own than 95% of those: V guesses"


def _improvement(one: RoundRecord) -> Iterator[str]:
    """Which passes made the challenger, and what Q says that came of it."""
    if one.settings.get("improved"):
        passes = ", then ".join(_pass(name, one) for name in one.curves)
        times = int(one.improved.get("policy_iterations", 1))
        often = f", {times} policy iterations on the same conversations" if times > 1 else ""
        said = f"Improved by {passes}{often}"
        yield said if passes else "No pass was configured: the challenger is the champion unchanged"
        for number in range(2, times + 1):
            if worth := one.improved.get(f"iteration_{number}_fit_effective_size"):
                own = words.count(worth, "suggestions")
                yield f"For Q of policy iteration {number} they are worth {own} of its own (effective sample size)"
        if missing := one.improved.get("iteration_left_out"):
            yield f"Policy iteration {missing:.0f} left out: the conversations tell too little of the policy by then"
    found = [one.evidence.get(f"q_{name}") for name in ("champion", "challenger", "gain_low", "gain_high")]
    before, after, low, high = found
    if before is None or after is None or low is None or high is None:
        return
    states = words.count(one.evidence.get("states"), "held-out states")
    span = f"95% interval {words.change(low)} to {words.change(high)}"
    doubt = ", so it may be chance" if low <= 0.0 <= high else ""
    moved = f"{'fell' if after < before else 'rose'} from {words.number(before)} to {words.number(after)}"
    yield f"E[Q] on {states} {moved}: {words.change(after - before)} ({span}{doubt})"


def _pass(name: str, one: RoundRecord) -> str:
    if name == "best_of_n":
        return f"best of {one.candidates or 'n'} by Q"
    return "the logged pass" if name == "logged" else words.ALGORITHMS.get(name, name)


def group_row(origin: str, owner: str, group: Group) -> dict[str, Any]:
    """One line of the table of conversations."""
    return {
        "origin": origin,
        "owner": owner,
        "conversations": words.count(group.success.conversations),
        "success": words.percent(group.success.rate),
        "interval": words.span(*group.interval),
        "adoption": [words.percent(group.adoption.get(name)) for name in ADOPTIONS],
        "abstained": words.percent(group.abstained),
        "turns": words.number(group.turns, 2),
        "returned": words.number(group.returned.value if group.returned else None),
    }


def guardrails(run: RunRecord) -> dict[str, Any] | None:
    """Every guardrail by round, the champion's value below the challenger's, and the last round's margins."""
    measured = [one for one in run.rounds if one.guardrails]
    if not measured:
        return None
    names = list(dict.fromkeys(name for one in measured for name in one.guardrails))
    return {
        "names": [words.GUARDRAILS.get(name, name) for name in names],
        "rows": [[one.number, *(_cell(one.guardrails.get(name)) for name in names)] for one in measured],
        "margins": [_margin(measured[-1].guardrails.get(name)) for name in names],
    }


def _cell(found: Guarded | None) -> dict[str, Any]:
    if found is None:
        return {"text": words.NOTHING, "sub": "", "found": "holds"}
    return {"text": words.brief(found.challenger), "sub": words.brief(found.champion), "found": found.found}


def _margin(found: Guarded | None) -> str:
    return words.NOTHING if found is None else words.brief(found.margin)


def examples(run: RunRecord) -> dict[str, Any]:
    """What both policies say in the same states, where they differ first.

    Of the promoted round whose examples differ most, the last of those that do; else of any round that has examples.
    """
    shown = [one for one in run.rounds if one.examples]
    if not shown:
        return {"talks": []}
    one = max(reversed([x for x in shown if x.promoted] or shown), key=lambda x: x.differing)
    before, after = _name(one.champion), _name(one.challenger)
    pending = one.decision is None and one.offline is not None and one.offline.verdict == "test"
    fate = "was promoted" if one.promoted else "has yet to prove itself" if pending else "was not promoted"
    return {
        "talks": [_talk(example) for example in sorted(one.examples, key=lambda x: not x.differs)],
        "before": f"Before{before}",
        "after": f"After{after}",
        "lead": f"The same held-out moments of round {one.number}, once with the champion{before} and once with its "
        f"challenger{after}, which {fate}.{_differing(one)} "
        "Q is the return that the model expects after that suggestion.",
    }


def _differing(one: RoundRecord) -> str:
    """In how many states the policies differ; empty for a gate that did not count them."""
    count = one.evidence.get("differing")
    if count is None:
        return ""
    first = ", and those come first" if count else ""
    return f" They differ in {words.count(count)} of {words.count(one.evidence.get('states'), 'states')}{first}."


def _name(policy: str | None) -> str:
    return f" ({words.policy(policy)})" if policy else ""


def _talk(example: Example) -> dict[str, Any]:
    pairs = [(("customer", customer), ("business", business)) for customer, business in example.messages]
    said = [message for pair in pairs for message in pair if message[1]]
    start = max(0, len(said) - RECENT)
    return {
        "earlier": said[:start],
        "fold": words.count(start, "earlier messages"),
        "recent": said[start:],
        "before": _speech(example.champion),
        "after": _speech(example.challenger),
    }


def _speech(said: Said) -> dict[str, Any]:
    q = "" if said.q is None else f"Q {words.number(said.q, 2)}"
    return {"text": said.text, "silent": said.text in ("", NO_SUGGESTION), "q": q}
