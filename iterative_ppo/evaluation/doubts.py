"""What in the figures of a fitted Q gives cause for doubt, each as one line with the figure and what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping


def doubts(figures: Mapping[str, float]) -> Iterator[str]:
    """Of what a fit reports (policy_evaluation.fit_q) and of Q on held-out conversations, by name."""
    yield from _one_class(figures)
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


def _one_class(figures: Mapping[str, float]) -> Iterator[str]:
    """An evidence part of which all conversations end alike."""
    if "held_out_successes" not in figures:
        return
    conversations, successes = (int(figures[f"held_out_{name}"]) for name in ("conversations", "successes"))
    if 0 < successes < conversations:
        return
    end = "reached a positive outcome" if successes else "ended without a positive outcome"
    found = f"all {conversations:,} held-out conversations {end}" if conversations else "no conversation is held out"
    yield (
        f"{found}: neither the AUC of Q nor a calibration of it can be told; collect more conversations, or raise "
        "data.evidence_share"
    )
