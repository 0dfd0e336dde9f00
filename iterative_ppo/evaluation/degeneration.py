"""Signs that a text has degenerated: it repeats itself, or compresses too well."""

from __future__ import annotations

import re
import zlib
from collections.abc import Hashable, Sequence

UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
"""Letters of scripts that part no words by spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, Chinese characters."""
_WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def words(text: str) -> list[str]:
    """What spaces part in a text; in scripts that have none between words, each letter."""
    return _WORD.findall(text)


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
