"""What in the figures of a fitted Q gives cause for doubt, each as one line with the figure and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

BEYOND = 0.05
"""Share of conversations that may be longer than Q has iterations."""
WORSE = -0.1
"""R2 on held-out conversations below which Q is worse than their mean by more than chance has it."""


def doubts(figures: Mapping[str, float]) -> Iterator[str]:
    """Of what a fit reports (policy_evaluation.fit_q) and of Q on held-out conversations, by name."""
    yield from _one_class(figures)
    yield from _too_few(figures)
    turns, without = (int(figures.get(f"fit_turns{name}", 0)) for name in ("", "_without_logprob"))
    if without:
        yield (
            f"{without:,} of {turns:,} logged suggestions have no behaviour_logprob: whether the policy would say "
            "them is not known, and Retrace looks no further than such a turn; log it when sampling"
        )
    if constant := int(figures.get("fit_constant_outcomes", 0)):
        what = "1 named outcome is" if constant == 1 else f"{constant} named outcomes are"
        yield (
            f"{what} the same in the conversations of all {turns:,} turns that Q was fitted to, so Q learnt at most "
            "how soon it comes; collect more conversations, or check how outcomes are labelled"
        )
    if (told := figures.get("r2", 0.0)) < WORSE:
        yield (
            f"Q is worse than the mean of held-out returns: its R2 there is {told:.2f}, so its praise means nothing; "
            "collect more conversations or fit Q longer, and where data.outcome_low to data.outcome_high is far wider "
            "than what an outcome has, give that one a range of its own in data.outcome_ranges"
        )
    if (share := figures.get("fit_share_beyond_iterations", 0.0)) > BEYOND:
        yield (
            f"{share:.0%} of the conversations that Q was fitted to have more turns than q.iterations, up to "
            f"{int(figures['fit_longest_conversation']):,}: what Q says of their beginnings is partly of whoever led "
            "them; set q.iterations to the usual length of a conversation"
        )


def label_doubts(figures: Mapping[str, float]) -> Iterator[str]:
    """Of a classifier of outcomes on held-out conversations (outcome_classifier), by name."""
    for key, alike in figures.items():
        named = key.removesuffix("_cost_of_one_class")
        if named == key or figures[f"{named}_cost"] < alike:
            continue
        cost, auc, recall = (figures[f"{named}_{figure}"] for figure in ("cost", "auc", "recall"))
        yield (
            f"the classifier of outcome {named.removeprefix('classifier_')!r} is no better than calling all "
            f"{int(figures['classifier_held_out']):,} held-out conversations alike (cost {cost:.3f} each, AUC "
            f"{auc:.2f}, recall {recall:.2f}), so its labels tell Q nothing; report more outcomes, or set labels.kind "
            "to reported or rule"
        )


def _one_class(figures: Mapping[str, float]) -> Iterator[str]:
    """An evidence part of which all conversations end alike."""
    if "held_out_successes" not in figures:
        return
    conversations, successes = _held_out(figures)
    if 0 < successes < conversations:
        yield from _one_class_of_an_outcome(figures, conversations)
        return
    end = "succeeded" if successes else "failed"
    found = f"all {conversations:,} held-out conversations {end}" if conversations else "no conversation is held out"
    untold = (
        "the AUC of Q cannot"
        if "forecast_error_isotonic" in figures
        else "neither the AUC of Q nor its worth as a forecast can"
    )
    yield f"{found}: {untold} be told; collect more conversations, or raise data.evidence_share"


def _one_class_of_an_outcome(figures: Mapping[str, float], conversations: int) -> Iterator[str]:
    """A named outcome that all of the evidence part reached, or none of it did."""
    for key, successes in figures.items():
        _, mark, name = key.partition("held_out_successes_")
        if mark and not 0 < successes < conversations:
            yield (
                f"{int(successes):,} of {conversations:,} held-out conversations reached outcome {name!r}: the AUC of "
                "its Q cannot be told; collect more conversations, or raise data.evidence_share"
            )


def _too_few(figures: Mapping[str, float]) -> Iterator[str]:
    """An evidence part that ends in both ways, but too seldom for a calibration to be fitted outside each fold."""
    conversations, successes = _held_out(figures)
    if figures.get("forecast_untold") and 0 < successes < conversations:
        yield (
            f"{successes:,} of {conversations:,} held-out conversations succeeded, too few "
            "to hold Q against how they ended: five conversations, and outcomes that differ also without a fifth of "
            "them, are needed; collect more conversations, or raise data.evidence_share"
        )


def _held_out(figures: Mapping[str, float]) -> tuple[int, int]:
    """Conversations, and those that succeeded."""
    conversations, successes = (int(figures.get(f"held_out_{name}", 0)) for name in ("conversations", "successes"))
    return conversations, successes
