"""Personal data in a text, by pattern: what can be recognised by its form, and checked by its check digits."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from iterative_ppo.errors import ConfigError


class Found(NamedTuple):
    """A kind of personal data and where it stands: text[start:end]."""

    kind: str
    start: int
    end: int


def luhn(text: str) -> bool:
    """Whether the check digit of a card number is right (ISO/IEC 7812-1); other characters than digits are skipped."""
    digits = [int(c) for c in text if c.isdigit()][::-1]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return bool(digits) and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def iban(text: str) -> bool:
    """Whether the check digits of an IBAN are right (ISO 13616: 1 modulo 97); spaces are skipped."""
    code = "".join(text.split()).upper()
    return int("".join(str(int(c, 36)) for c in code[4:] + code[:4])) % 97 == 1


def telephone(text: str) -> bool:
    """Whether it has as many digits as a number with its area code (E.164: at most 15), and is no date."""
    digits = sum(c.isdigit() for c in text)
    return 9 <= digits <= 15 and not re.fullmatch(r"\d{4}[-./ ]\d\d[-./ ]\d\d.*|\d\d[-./ ]\d\d[-./ ]\d{4}.*", text)


def anything(text: str) -> bool:
    """Nothing to check beyond the form."""
    return True


OCTET = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"
KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("e-mail", re.compile(r"(?<![\w.+-])[\w.+%-]+@[\w-]+(?:\.[\w-]+)*\.[^\W\d_]{2,}(?![\w-])"), anything),
    ("iban", re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,30}\b"), iban),
    ("card", re.compile(r"(?<![\w.,+-])\d(?:[ -]?\d){12,18}(?![\w-])"), luhn),
    ("us social security", re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])"), anything),
    ("ip address", re.compile(rf"(?<![\w.])(?:{OCTET}\.){{3}}{OCTET}(?!\w|\.\d)"), anything),
    ("telephone", re.compile(r"(?<![\w.,+/-])(?:\+|00|0|\()[\d()](?:[ ./()-]{0,2}\d){7,16}(?![\w-])"), telephone),
    ("telephone", re.compile(r"(?<![\w.,+/-])\d{3}[ .-]\d{3}[ .-]\d{4}(?![\w-])"), telephone),
)
"""Kind, form, further check. What an earlier kind has claimed is not looked at again."""


def find(text: str) -> list[Found]:
    """Personal data in a text, in order of place. Names and addresses have no form of their own: see `presidio`."""
    found: list[Found] = []
    for kind, form, right in KINDS:
        for match in form.finditer(text):
            free = all(match.end() <= other.start or other.end <= match.start() for other in found)
            if free and right(match.group()):
                found.append(Found(kind, match.start(), match.end()))
    return sorted(found, key=lambda one: one.start)


def by_pattern(texts: Sequence[str]) -> np.ndarray:
    """(N,) 1 where a text holds personal data that `find` recognises, else 0."""
    return np.array([float(bool(find(text))) for text in texts])


def by_presidio(texts: Sequence[str], language: str = "en", threshold: float = 0.5) -> np.ndarray:
    """(N,) 1 where Microsoft Presidio recognises personal data with at least that score (names and places too).

    Raises ConfigError where it is not installed: `pip install 'iterative-ppo[pii]'`, and a spaCy model.
    """
    found = (_presidio().analyze(text=text, language=language, score_threshold=threshold) for text in texts)
    return np.array([float(bool(one)) for one in found])


@cache
def _presidio() -> Any:
    try:
        from presidio_analyzer import AnalyzerEngine
    except ImportError as error:
        raise ConfigError(
            f"guardrail function presidio: {error}; pip install 'iterative-ppo[pii]', or choose the function pii"
        ) from None
    return AnalyzerEngine()
