"""A state as the prompt that the policy sees, and a conversation as one token sequence where rendering is append-only.

In the markers' form a conversation reads: context, customer, suggestion, end of sequence, business, customer, ...
With a chat template the assistant's messages are the suggestions; the user's tell what was sent and answered.
Either way the tokens of s_{i+1} should begin with those of s_i, a_i and the end of sequence; `encode` checks it and
falls back to a sequence a turn where a template or truncation breaks it.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from iterative_ppo.errors import ModelError
from iterative_ppo.mdp.bisection import first_that
from iterative_ppo.mdp.chat_template import ChatTemplate, Said
from iterative_ppo.mdp.conversation import ABSTAIN, Conversation, State, Suggestion, Turn, same_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKERS = {
    "context": "<|context|>",
    "customer": "<|customer|>",
    "suggestion": "<|suggestion|>",
    "business": "<|business|>",
    "verbatim": "<|verbatim|>",
    "missing": "<|missing|>",
    "no_reply": "<|no_reply|>",
}
_IN_BRACKETS = re.compile(r"[<(\[{].+[>)\]}]")
_PLAIN = {
    "context": "Context: ",
    "customer": "\nCustomer: ",
    "suggestion": "\nSuggestion: ",
    "business": "\nBusiness: ",
    "verbatim": "(the suggestion as it is)",
    "missing": "(not recorded)",
    "no_reply": "(no reply)",
}

REMEMBERED_TEXTS = 10_000


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids of a state, how many of its oldest turns were left out to fit, and tokens that it lacks beside those.

    It lacks some where even without any turn it would be too long: of the context its end, of what the customer says
    its beginning, of the longer one first.
    """

    tokens: tuple[int, ...]
    truncated_turns: int = 0
    cut_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Span:
    """Where a turn lies in a sequence: the response (with its end of sequence) is tokens[start:end].

    V(s) is read at start - 1, Q(s, a) at end - 1. `trains` is False where the suggestion was not logged, or is longer
    than the policy could read.
    """

    row: int
    start: int
    end: int
    trains: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """One token sequence with the turns it holds; all turns of a conversation where prefixes can be shared."""

    tokens: tuple[int, ...]
    spans: tuple[Span, ...]


class Renderer:
    """Turns states and suggestions into token ids for one tokenizer.

    Args:
        tokenizer: any Hugging Face tokenizer with an end of sequence; its chat template is used where it has one.
        max_prompt_tokens: longer prompts lose their oldest turns; the loss is counted.
        max_response_tokens: longest response, end of sequence included.
        abstain: the response that means no suggestion.

    `instruction` stands before the conversation, as the system's message where a chat template takes one.
    `eos` ends a response: the token with which the chat template ends an assistant's turn, else the end of sequence.
    `ordinary` are the ids of tokens that are not special.

    Raises ModelError where the tokenizer has no end of sequence or cannot spell `abstain` before it, or its chat
    template fails on a plain conversation.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int, max_response_tokens: int, abstain: str
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence token; set eos_token")
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_tokens = max_prompt_tokens + max_response_tokens
        self.abstain = abstain
        self.instruction = ""
        vocabulary = tokenizer.get_vocab()
        self._labels = {name: token if token in vocabulary else _PLAIN[name] for name, token in MARKERS.items()}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        self.ordinary = {i for token, i in vocabulary.items() if token not in special}
        self._cache: dict[str, tuple[int, ...]] = {}
        self.template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
        after = self.ids(self.template.after_answer) if self.template else ()
        self.eos: int = after[0] if after and after[0] not in self.ordinary else tokenizer.eos_token_id
        adds_first = tokenizer.bos_token_id is not None and tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
        self._first: tuple[int, ...] = (tokenizer.bos_token_id,) if adds_first else ()
        written: Any = tokenizer.decode(list(self.ids(abstain)))
        if not self.abstains(written):
            raise ModelError(
                f"{tokenizer.name_or_path}: its tokens cannot spell policy.abstain {abstain!r}, and read it back as "
                f"{written!r}; choose one in its alphabet"
            )
        if self.eos in self.ids(abstain):
            raise ModelError(
                f"{tokenizer.name_or_path}: policy.abstain {abstain!r} holds the token that ends a response, so "
                "it could never be said; choose another text"
            )

    def ids_in_use(self) -> set[int]:
        """Ids that a prompt or a response may hold: all ordinary ones, and the special ones that rendering writes."""
        template = self.template
        written = self._chat(template, State((Turn("a", (), ABSTAIN, "a"),), "a", "a")) if template else ()
        labels = {i for text in self._labels.values() for i in self.ids(text)}
        system = self.ids(template.instructed()) if template and template.takes_system else ()
        return self.ordinary | {self.eos, *self._first, *self.ids(self.abstain), *written, *labels, *system}

    def ids(self, text: str) -> tuple[int, ...]:
        """Token ids of a text without special tokens, remembered for a while."""
        if text not in self._cache:
            if len(self._cache) >= REMEMBERED_TEXTS:
                self._cache.clear()
            self._cache[text] = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return self._cache[text]

    def _plain(self, message: str | None) -> str:
        """A message in which special tokens stay letters: nobody writes a turn of their own into the conversation."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", message or "")

    def response(self, suggestion: Suggestion) -> tuple[int, ...]:
        """Token ids of an action, end of sequence included. An unlogged one has a stand-in, which never trains."""
        return (*self._behind_a_prompt(self._spoken(suggestion)), self.eos)

    def abstains(self, text: str) -> bool:
        """Whether a response's text is no suggestion: it holds the mark, or is the spelled words and no more.

        A mark is a token in reserve, or stands in brackets, as `<|abstain|>` does. A suggestion may hold plain words: a
        spelled "PASS" is in every PASSPORT.
        """
        tokens = self.ids(self.abstain)
        reserved = len(tokens) == 1 and tokens[0] not in self.ordinary
        marked = reserved or _IN_BRACKETS.fullmatch(self.abstain)
        return self.abstain in text if marked else text.strip() == self.abstain.strip()

    def _behind_a_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of a message where it stands: a first word has other tokens than one that follows."""
        if self.template is None:
            return self.ids(text)
        opening, said = self.template.opening, self.template.space + text
        before, whole = self.ids(opening), self.ids(opening + said)
        return whole[len(before) :] if whole[: len(before)] == before else self.ids(said)

    def prompt(self, state: State) -> Prompt:
        """The prompt of a state, without its oldest turns where it would be too long.

        A chat template is taken to write no less for a turn more; of one that does, other turns may be left out.
        """
        return next(self._prompts((state,)))

    def _prompts(self, states: Iterable[State]) -> Iterator[Prompt]:
        """The prompts of states of one conversation, in its order."""
        return self._chats(self.template, states) if self.template else self._marked(states)

    def _fitted(self, tokens: tuple[int, ...], skipped: int, cut: int = 0) -> Prompt:
        """A prompt, cut at its beginning where it is too long without any text, as under a long instruction."""
        if (excess := len(tokens) - self.max_prompt_tokens) > 0:
            first = tokens[:1] if tokens[0] == self.tokenizer.bos_token_id else ()
            tokens = first + tokens[len(first) + excess :]
        return Prompt(tokens, skipped, cut + max(0, excess))

    def _marked(self, states: Iterable[State]) -> Iterator[Prompt]:
        """A turn's tokens are the same in every prompt that holds it, so they are made once."""
        past: list[int] = []
        ends = [0]
        for state in states:
            for turn in state.history[len(ends) - 1 :]:
                past += self._told(turn)
                ends.append(len(past))
            head, asked, now = self._head(state.context), self._asked(state.customer_message), len(state.history)
            room = self.max_prompt_tokens - len(head) - len(asked)
            skipped = bisect_left(ends, ends[now] - room, hi=now)
            if room < 0:
                yield self._shortened(state, -room)
            else:
                yield self._fitted((*head, *past[ends[skipped] : ends[now]], *asked), skipped)

    def _shortened(self, state: State, excess: int) -> Prompt:
        """Without any turn, and so many tokens of its text less as far as it has them."""
        context, said = (
            self.ids(self._plain(text)) if text else () for text in (state.context, state.customer_message)
        )
        kept = _shares(len(context), len(said), len(context) + len(said) - excess)
        head = self._head(state.context)
        asked = self._label("customer") + said[len(said) - kept[1] :] + self._label("suggestion")
        cut = len(context) - kept[0], len(said) - kept[1]
        return self._fitted((*head[: len(head) - cut[0]], *asked), len(state.history), sum(cut))

    def _head(self, context: str | None) -> tuple[int, ...]:
        instruction = self.ids(self.instruction + "\n") if self.instruction else ()
        if context is None:
            return self._first + instruction
        return self._first + instruction + self._label("context") + self.ids(self._plain(context))

    def _told(self, turn: Turn) -> tuple[int, ...]:
        response = self.response(_action_of(turn))
        return self._asked(turn.customer_message) + response + self._label("business") + self.ids(self._sent(turn))

    def _asked(self, message: str | None) -> tuple[int, ...]:
        return self._label("customer") + self.ids(self._plain(message)) + self._label("suggestion")

    def _label(self, name: str) -> tuple[int, ...]:
        return self.ids(self._labels[name])

    def _sent(self, turn: Turn) -> str:
        if turn.business_message is None:
            return self._labels["no_reply"]
        action = turn.suggestion
        if turn.adoption == "verbatim" and action and same_words(action.text or "", turn.business_message):
            return self._labels["verbatim"]
        return self._plain(turn.business_message)

    def _chats(self, template: ChatTemplate, states: Iterable[State]) -> Iterator[Prompt]:
        """A template may write a turn otherwise in each prompt; most prompts begin near where the one before did."""
        skipped = 0
        for state in states:
            prompt = self._fitting_chat(template, state, skipped)
            skipped = prompt.truncated_turns
            yield prompt

    def _fitting_chat(self, template: ChatTemplate, state: State, near: int) -> Prompt:
        @cache
        def rendered(skipped: int) -> tuple[int, ...]:
            return self._chat(template, replace(state, history=state.history[skipped:]))

        def fits(skipped: int) -> bool:
            return len(rendered(skipped)) <= self.max_prompt_tokens

        skipped = first_that(fits, near, len(state.history))
        return self._fitted(rendered(skipped), skipped) if fits(skipped) else self._shortened_chat(template, state)

    def _shortened_chat(self, template: ChatTemplate, state: State) -> Prompt:
        """As `_shortened`, by letters: what the template writes around a text stays whole."""
        context, said = state.context or "", state.customer_message or ""

        @cache
        def rendered(letters: int) -> tuple[int, ...]:
            kept = _shares(len(context), len(said), len(context) + len(said) - letters)
            return self._chat(template, State((), said[len(said) - kept[1] :], context[: kept[0]] or None))

        def fits(letters: int) -> bool:
            return len(rendered(letters)) <= self.max_prompt_tokens

        every = len(context) + len(said)
        excess = len(rendered(0)) - self.max_prompt_tokens
        letters = first_that(fits, every * excess // len(rendered(0)), every)
        return self._fitted(rendered(letters), len(state.history), len(rendered(0)) - len(rendered(letters)))

    def _chat(self, template: ChatTemplate, state: State) -> tuple[int, ...]:
        said: list[Said] = []
        heard = f"{_PLAIN['context']}{self._plain(state.context)}\n" if state.context is not None else ""
        for turn in state.history:
            said.append(("user", f"{heard}Customer: {self._plain(turn.customer_message)}"))
            said.append(("assistant", self._spoken(_action_of(turn))))
            heard = f"Business: {self._sent(turn)}\n"
        said.append(("user", f"{heard}Customer: {self._plain(state.customer_message)}"))
        if self.instruction and template.takes_system:
            said.insert(0, ("system", self.instruction))
        elif self.instruction:
            said[0] = ("user", f"{self.instruction}\n{said[0][1]}")
        return tuple(self.tokenizer.encode(template.prompt(said), add_special_tokens=False))

    def _spoken(self, suggestion: Suggestion) -> str:
        if suggestion.status == "missing":
            return self._labels["missing"]
        return self.abstain if suggestion.status == "abstained" else self._plain(suggestion.text)

    def encode(self, conversation: Conversation, first_row: int = 0) -> tuple[list[Encoded], int]:
        """All turns with an action as token sequences, and the number of turns that truncation took from prompts, a
        prompt that is cut within its own text counting as one more.

        Args:
            first_row: table row of the conversation's first turn; spans name rows from there.
        """
        turns = [i for i, turn in enumerate(conversation.turns) if not turn.terminal]
        pieces, truncated = [], 0
        for i, prompt in zip(turns, self._prompts(map(conversation.state, turns)), strict=True):
            truncated += prompt.truncated_turns + (prompt.cut_tokens > 0)
            action = _action_of(conversation.turns[i])
            pieces.append((first_row + i, prompt.tokens, self.response(action), action.status != "missing"))
        return (shared(pieces, self.max_tokens) or [within(self.max_tokens, *piece) for piece in pieces]), truncated


def _shares(one: int, other: int, room: int) -> tuple[int, int]:
    """How much of two lengths there is room for: the longer one gives way until they are alike."""
    room = max(0, room)
    kept = min(one, max(room // 2, room - other))
    return kept, min(other, room - kept)


def _action_of(turn: Turn) -> Suggestion:
    assert turn.suggestion is not None, "a terminal turn has no action"
    return turn.suggestion


def single(row: int, prompt: tuple[int, ...], response: tuple[int, ...], trains: bool) -> Encoded:
    """One turn as a sequence of its own."""
    return Encoded(prompt + response, (Span(row, len(prompt), len(prompt) + len(response), trains),))


def within(limit: int, row: int, prompt: tuple[int, ...], response: tuple[int, ...], trains: bool) -> Encoded:
    """One turn as a sequence of at most `limit` tokens; a suggestion that is cut for it never trains."""
    room = limit - len(prompt)
    return single(row, prompt, response[:room], trains and len(response) <= room)


def shared(
    pieces: Sequence[tuple[int, tuple[int, ...], tuple[int, ...], bool]], max_tokens: int
) -> list[Encoded] | None:
    """All turns as one sequence, or None where some prompt does not continue the turn before it."""
    if not pieces:
        return []
    _, prompt, response, _ = pieces[-1]
    whole = prompt + response
    if len(whole) > max_tokens:
        return None
    spans = []
    for row, prompt, response, trains in pieces:
        end = len(prompt) + len(response)
        if whole[: len(prompt)] != prompt or whole[len(prompt) : end] != response:
            return None
        spans.append(Span(row, len(prompt), end, trains))
    return [Encoded(whole, tuple(spans))]
