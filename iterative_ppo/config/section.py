"""What all sections of the configuration are."""

from __future__ import annotations

import re

from pydantic import BaseModel, ConfigDict, Field

Share = Field(ge=0.0, le=1.0)
Rate = Field(gt=0.0, lt=1.0)
Positive = Field(gt=0.0)
Count = Field(ge=1)


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def regular_expression(pattern: str) -> str:
    """A pattern that Python can compile. Raises ValueError."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}; mend or quote it") from None
    return pattern
