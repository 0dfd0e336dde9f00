"""Numbers as a reader expects them, and the names of things in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from iterative_ppo.evaluation.ab_test import ABTest, p_in_words
from iterative_ppo.evaluation.gate import UNSHOWN, UNTOLD
from iterative_ppo.learning.objective import WITHOUT_COST

NOTHING = "–"
LOGGED = "logged"
SALES = {"purchase", "sold", "sale"}
CHECKS = {
    "E[Q]": "Expected outcome",
    "certificate:": "Certificate",
    "off-policy gain": "Off-policy estimate",
    "guardrail kl": "Stays near the champion",
    "guardrail unfinished": "Finishes what it says",
    "guardrail repetition": "Does not repeat itself",
    "guardrail compression": "Is no loop",
    "guardrail length": "Keeps to the usual length",
    "guardrail brevity": "Is not too short",
    "guardrail abstention": "Abstains no more than before",
    "guardrail pii": "Keeps personal data to itself",
    "guardrail acceptance": "Staff accept it",
    "guardrail reward": "All outcomes together",
    "guardrail calibration": "Q keeps its promises",
    "guardrail": "Guardrail",
    "challenger": "What customers did",
}
MARKS = {"failed": "failed", "passed": "passed", UNSHOWN: "unknown", UNTOLD: "unknown"}
GUARDRAILS = {
    "kl": "KL to the champion",
    "length": "Length, 95th percentile",
    "brevity": "Mean length",
    "unfinished": "Without an end",
    "repetition": "Repeated bigrams",
    "compression": "Compression",
    "abstention": "Abstained",
    "pii": "Personal data",
    "acceptance": "Acceptance",
    "reward": "Mean of all outcomes, weighted",
    "calibration": "Calibration error of Q",
}

ALGORITHMS = {"ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO"}

SUCCESS = "Successful conversation"
GLOSSARY = (
    ("Policy", "A version of the assistant: its weights, tokenizer and sampling temperature."),
    ("Champion, challenger", "The policy that serves customers now, and the newer one that is tested against it."),
    ("Round", "Collect conversations, learn from them, test the result: one turn of the wheel."),
    (SUCCESS, ""),
    ("A/B test", "Customers are split at random between both policies; how often one looks is planned, and paid for."),
    ("95% interval", "The range that holds the true value in 95 of 100 such experiments."),
    ("p", "How often chance alone would show at least this gain if the new policy were no better."),
    ("Return", "The outcome of the rest of the conversation, worth a little less for each turn that it takes."),
    ("Q", "A model of the return to expect after a given suggestion in a given state of the conversation."),
    (
        "R², state-only R²",
        "Share of the returns' variation that Q explains; state-only, without seeing the suggestion.",
    ),
    ("AUC", "How often Q ranks a turn of a successful conversation above one of a failed one; 0.5 is guessing."),
    ("Calibration error", "How far Q's promises lie from what came true; beside it, what a perfect Q shows by chance."),
    ("Credit", "What a turn is paid for its share in the outcome; Q may be fitted to that instead of the outcome."),
    ("KL", "How far two policies' answers differ, in nats a response; 0 means the same."),
    ("Entropy", "How varied the answers are; near 0 the policy always says the same."),
    (
        "Improvement",
        "What makes a challenger of the champion: one or more passes against a fixed Q, one after the other.",
    ),
    ("Logged pass", "Learning from the suggestions that were made: more of what went better than expected."),
    ("Best of n", "Of n answers that the policy gives in a state it learns the one that Q likes best."),
    ("PPO", "A method that moves a policy towards answers that Q likes, in small steps."),
    ("GRPO, RLOO", "Methods like PPO that compare several answers to the same state with each other."),
    ("Judges", "Members of Q that the improvement does not see; they tell whether Q's praise is deserved."),
    ("Held-out", "Conversations that neither Q nor the policy has learned from."),
    ("Offline gate", "Checks on held-out conversations that a challenger must pass before customers meet it."),
    (
        "Guardrail",
        "Something in which a challenger may not be worse than the champion by more than a margin, such as its length.",
    ),
    (
        "Certificate",
        "Evidence from logs alone that a policy is better; it supports a decision, only an A/B test makes it.",
    ),
    ("Acceptance", "What staff do with a suggestion: send it verbatim, edit it, or write something else."),
    ("Abstention", "The policy chooses to suggest nothing and leaves the answer to a person."),
    ("Quarantine", "Where conversations with faulty records go, each with its reason; nothing learns from them."),
)


def policy(version: str) -> str:
    """A policy by its version; conversations of a log were somebody's, called the logged policy, or one of several."""
    logged, _, name = version.partition(" ")
    whose, name = ("logged policy", name) if logged == LOGGED else ("policy", version)
    return f"{whose}\N{NO-BREAK SPACE}{name}" if name else whose


def percent(share: float | None) -> str:
    """0.7134 as 71.3%."""
    return NOTHING if share is None or math.isnan(share) else f"{share:.1%}"


def span(low: float, high: float) -> str:
    """An interval of shares: 69.3–73.2%."""
    return f"{100 * low:.1f}–{high:.1%}"


def points(gain: float) -> str:
    """A difference of shares: +51.2 points."""
    return f"{_signed(100 * gain)} points"


def points_span(low: float, high: float) -> str:
    """An interval of a difference of shares: +48.5 to +53.8."""
    return f"{_signed(100 * low)} to {_signed(100 * high)}"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number with a true minus sign."""
    return NOTHING if value is None else f"{value:.{digits}f}".replace("-", "−")


def count(value: float | None, noun: str = "") -> str:
    """1,200 conversations; the noun is given in the plural."""
    if value is None:
        return NOTHING
    word = noun[:-1] if value == 1 else noun
    return f"{value:,.0f} {word}".strip()


def times(count: int) -> str:
    """How often: once, or 3 times."""
    return "once" if count == 1 else f"{count} times"


def origin(name: str) -> str:
    """Who says an outcome, as `outcome_origin` names it."""
    return {"rule": "by rule", "none": "that nobody reported"}.get(name, name.replace("classifier:", "by classifier "))


def gain(test: ABTest) -> str:
    """A test's gain with its interval and p."""
    return (
        f"{points(test.gain)} (95% interval {points_span(test.gain_low, test.gain_high)}, {p_in_words(test.p_value)})"
    )


def succeeds(outcomes: Mapping[str, float], above: float) -> str:
    """What the assistant does in a successful conversation, by the outcomes' names: `sells in`.

    Args:
        above: the R above which a conversation is a success.
    """
    names, weights = sorted(outcomes), outcomes.values()
    if above == WITHOUT_COST:
        return f"ends without {_any(names)} in"
    if above or (weights and max(weights) <= 0):
        return f"succeeds (R above {brief(above)}) in"
    if len(names) != 1:
        if min(weights, default=0.0) < 0:
            return "gains more than it costs in"
        return "reaches an outcome in"
    if names[0] in SALES:
        return "sells in"
    return "succeeds in" if names[0] == "success" else f"reaches “{names[0]}” in"


def succeeded(outcomes: Mapping[str, float], above: float) -> str:
    """The same of conversations: `succeeded`, or of costs alone `ended without “escalated”`."""
    return f"ended without {_any(sorted(outcomes))}" if above == WITHOUT_COST else "succeeded"


def glossary(outcomes: Mapping[str, float], above: float) -> tuple[tuple[str, str], ...]:
    """Terms and what they mean, success as it is in this run."""
    meaning = "One that ended with a positive outcome, for example a purchase."
    if above == WITHOUT_COST:
        meaning = f"One that {succeeded(outcomes, above)}."
    elif above or min(outcomes.values(), default=0.0) < 0:
        meaning = f"One whose R, the weighted sum of its outcomes, is above {brief(above)}."
    return tuple((term, meaning if term == SUCCESS else found) for term, found in GLOSSARY)


def _any(names: Sequence[str]) -> str:
    """“escalated”, or “escalated” or “refund”."""
    return " or ".join(f"“{name}”" for name in names)


def change(value: float, digits: int = 3) -> str:
    """A difference with its sign: +0.050."""
    return _signed(value, digits)


def brief(value: float | None) -> str:
    """A number of any unit in three digits."""
    return NOTHING if value is None else f"{value:.3g}".replace("-", "−")


def reason(text: str) -> tuple[str, str, str]:
    """A gate's reason as (`failed`, `passed`, `unknown` or nothing; what was checked; what was found)."""
    mark, colon, found = text.partition(": ")
    if not colon or mark not in MARKS:
        mark, found = "", text
    checked = next((name for sign, name in CHECKS.items() if sign in found), "")
    found = found.removeprefix("certificate: ").removeprefix("off-policy gain of whole conversations: ")
    found = found.removeprefix("guardrail ")
    if mark in (UNSHOWN, UNTOLD):
        found = f"{mark.capitalize()}: {found}"
    return MARKS.get(mark, ""), checked, found


def _signed(value: float, digits: int = 1) -> str:
    return f"{value:+.{digits}f}".replace("-", "−")
