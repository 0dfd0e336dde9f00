"""Signs that a text has degenerated: it repeats itself, or compresses too well."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence


def repeated_ngrams(sequence: Sequence[Hashable], n: int = 2) -> float:
    """Share of n-grams that already stood in the sequence (rep-n, Welleck et al. 2020, arXiv 1908.04319).

    Bigrams show loops of any period. 0 for a sequence without any.
    """
    grams = [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def compression(text: str) -> float:
    """Bytes of the text over bytes of it compressed by zlib; about 1 for a sentence, NaN for an empty text.

    Unlike n-grams it needs no tokens, and also sees repeats that differ a little or that lie within words.
    """
    raw = text.encode()
    return len(raw) / len(zlib.compress(raw)) if raw else float("nan")
