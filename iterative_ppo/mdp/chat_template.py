"""A tokenizer's chat template, asked for the assistant's next message, whatever a family's own template asks for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any

from iterative_ppo.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Said = tuple[str, str]
"""Who said it (system, user or assistant), and what."""

INSTRUCTION, QUESTION, ANSWER = "INSTRUCTION", "QUESTION", "ANSWER"
"""What stands for a message where a template is asked what it writes around one."""
EXCHANGE: tuple[Said, Said] = ("user", QUESTION), ("assistant", ANSWER)
TODAY = datetime(2026, 7, 1)
"""The day that it is in every prompt of a template that writes one: a state's prompt must not change overnight."""

_CLOCK = re.compile(r"""strftime_now\(\s*(?P<quote>['"])(?P<format>.*?)(?P=quote)\s*\)""")


class ChatTemplate:
    """What a chat template writes of a conversation.

    `opening` is what it writes between a user's message and the assistant's; `space` is the white space after what it
    asks with, before an answer: a response begins with it, as the model's own do.

    Raises ModelError where the template fails on turns of user and assistant, or leaves out what the user says.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._dated = _dated(tokenizer)
        self._parts = self._reads_parts()
        self._thinks, self.opening, self.space = self._openings()

    def prompt(self, said: Sequence[Said]) -> str:
        """The text after which the assistant's message comes."""
        return self._before_answer([*said, EXCHANGE[1]]) if self._thinks else self.written(said, asks=True)

    @cached_property
    def after_answer(self) -> str:
        """What follows an assistant's message; some write nothing before the user's next."""
        going_on = self.written([*EXCHANGE, EXCHANGE[0]], asks=True)
        ended = self.written(EXCHANGE, asks=False).rpartition(ANSWER)[2].strip()
        return ended or going_on.rpartition(ANSWER)[2].strip()

    @cached_property
    def takes_system(self) -> bool:
        """Whether it writes a system's message; some refuse it or leave it out."""
        try:
            return INSTRUCTION in self.instructed()
        except ModelError:
            return False

    def instructed(self) -> str:
        """A prompt that begins with a system's message."""
        return self.prompt([("system", INSTRUCTION), ("user", QUESTION)])

    def written(self, said: Sequence[Said], asks: bool) -> str:
        """The template's own text.

        Args:
            asks: whether it ends with what the template asks for the next message with.
        """
        apply: Any = self.tokenizer.apply_chat_template
        messages = [{"role": role, "content": self._content(text)} for role, text in said]
        try:
            text: str = apply(messages, tokenize=False, add_generation_prompt=asks, **self._dated)
        except Exception as error:  # a template is a program of its own, and raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise self._unfit(f"fails on turns of user and assistant ({reason})") from None
        return text

    def _content(self, text: str) -> str | list[dict[str, str]]:
        return [{"type": "text", "text": text}] if self._parts else text

    def _before_answer(self, said: Sequence[Said]) -> str:
        return self.written(said, asks=False).rpartition(ANSWER)[0]

    def _reads_parts(self) -> bool:
        """Whether it takes a message for a list of parts, as those of models that see images do."""
        problem = self._unfit("leaves out what the user says")
        for self._parts in (False, True):
            try:
                text = self.written(EXCHANGE, asks=False)
            except ModelError as failed:
                problem = problem if self._parts else failed
                continue
            if QUESTION in text:
                return self._parts
        raise problem

    def _openings(self) -> tuple[bool, str, str]:
        """Whether it asks for thoughts, or a channel, before an answer; the opening; and the space before an answer.

        A response is the message itself. Where the template would ask for more, the prompt is what it writes before an
        answer that is there.
        """
        opened, before = self.written(EXCHANGE[:1], asks=True), self._before_answer(EXCHANGE)
        opened, (_, written, before) = opened.rpartition(QUESTION)[2], before.rpartition(QUESTION)
        if not written:
            return False, opened, ""
        if opened.strip() != before.strip():
            return True, before, ""
        return False, opened, before.removeprefix(opened) if before.startswith(opened) else ""

    def _unfit(self, how: str) -> ModelError:
        advice = "mend it, or remove chat_template to have plain prompts"
        return ModelError(f"{self.tokenizer.name_or_path}: its chat template {how}; {advice}")


def _dated(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The template with a day of its own, as an argument, where it would write the day on which it is used."""
    named: Any = tokenizer.chat_template
    template = named.get("default", "") if isinstance(named, dict) else named
    if "strftime_now" not in template:
        return {}
    written = _CLOCK.sub(lambda found: repr(TODAY.strftime(found["format"])), template)
    return {"chat_template": written}
