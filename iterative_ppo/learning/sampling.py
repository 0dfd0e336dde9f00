"""Reading prompts and writing tokens after them, with a key-value cache or, where that does not serve, without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from iterative_ppo.learning.forward import backbone, own_logits, vocabulary_logits
from iterative_ppo.learning.last_layer import hidden_at, read_at
from iterative_ppo.learning.sequences import Prompts

LogDistribution = Callable[[torch.Tensor], torch.Tensor]
Written = tuple[tuple[int, ...], np.ndarray]
"""A response's tokens, and (length,) the log-prob of each as it was sampled."""


class Reader(Protocol):
    """A batch of texts that grow by a token at a time."""

    def logits(self) -> torch.Tensor:
        """(B, V) of each text's next token."""

    def repeat(self, count: int) -> None:
        """Go on with each row `count` times; after `logits`, before `write`."""

    def write(self, tokens: torch.Tensor) -> None:
        """Append (B,) tokens."""

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with some rows alone."""


class CachedReader:
    """Each token is read once. Prompts are padded on the left, masked, and have their own positions."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, pad: int) -> None:
        self.model, self.cache = model, None
        self.inputs, self.mask = _left_padded(prompts, pad, model.device)
        self.position = (self.mask.cumsum(1) - 1).clamp_min(0)

    def last(self) -> torch.Tensor:
        """(B, H) of the last token."""
        wanted = torch.zeros(self.inputs.shape, dtype=torch.bool, device=self.inputs.device)
        wanted[:, -1] = True
        with read_at(self.model, wanted):
            return self.hidden()[:, -1]

    def hidden(self) -> torch.Tensor:
        """(B, T, H) of the T tokens that came since it was called last."""
        out: Any = backbone(self.model)(
            input_ids=self.inputs,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        hidden: torch.Tensor = out.last_hidden_state
        return hidden

    def logits(self) -> torch.Tensor:
        return vocabulary_logits(self.model, self.last())

    def branch(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Go on with some rows, each as often as it is named, and append (R, L) tokens; what pads them comes last."""
        self.keep(rows)
        self.inputs = tokens
        self.position = self.position[:, -1:] + 1 + torch.arange(tokens.shape[1], device=tokens.device)
        self.mask = torch.cat([self.mask, torch.ones_like(tokens)], dim=1)

    def repeat(self, count: int) -> None:
        cache: Any = self.cache
        cache.batch_repeat_interleave(count)
        self.mask, self.position = (x.repeat_interleave(count, dim=0) for x in (self.mask, self.position))

    def write(self, tokens: torch.Tensor) -> None:
        self.inputs, self.position = tokens[:, None], self.position[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)

    def keep(self, rows: torch.Tensor) -> None:
        cache: Any = self.cache
        cache.batch_select_indices(rows)
        self.inputs, self.mask, self.position = self.inputs[rows], self.mask[rows], self.position[rows]


class RereadingReader:
    """Every text is read from its beginning for each token, padded on the right: slow, and right for any causal LM."""

    def __init__(self, model: PreTrainedModel, prompts: Prompts, pad: int, plain_head: bool) -> None:
        self.model, self.pad, self.plain_head = model, pad, plain_head
        self.lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        self.tokens = right_padded(prompts, pad, model.device)

    def logits(self) -> torch.Tensor:
        rows = torch.arange(len(self.tokens), device=self.tokens.device)
        if self.plain_head:
            return vocabulary_logits(self.model, hidden_at(self.model, self.tokens, rows, self.lengths - 1))
        return own_logits(self.model, self.tokens)[rows, self.lengths - 1]

    def repeat(self, count: int) -> None:
        self.tokens, self.lengths = (x.repeat_interleave(count, dim=0) for x in (self.tokens, self.lengths))

    def write(self, tokens: torch.Tensor) -> None:
        if int(self.lengths.max()) == self.tokens.shape[1]:
            self.tokens = torch.nn.functional.pad(self.tokens, (0, 1), value=self.pad)
        self.tokens[torch.arange(len(tokens), device=tokens.device), self.lengths] = tokens
        self.lengths = self.lengths + 1

    def keep(self, rows: torch.Tensor) -> None:
        self.lengths = self.lengths[rows]
        self.tokens = self.tokens[rows, : int(self.lengths.max())]


def write_responses(
    reader: Reader, log_distribution: LogDistribution, uniform: torch.Tensor, eos: int, samples: int = 1
) -> list[Written]:
    """`samples` responses a row, those of a row side by side.

    A prompt is read once for all of its responses. Rows that have ended leave once they are half of the batch.

    Args:
        uniform: (B samples, L) in [0, 1): which quantile of its distribution each token is; L is the longest response.
    """
    count, limit = uniform.shape
    done: list[Written] = [((), np.zeros(0, np.float32))] * count
    alive = torch.arange(count, device=uniform.device)
    written = torch.zeros((count, 0), dtype=torch.long, device=uniform.device)
    logprobs = torch.zeros((count, 0), device=uniform.device)
    ended = torch.zeros(count, dtype=torch.bool, device=uniform.device)

    def store(rows: torch.Tensor) -> None:
        found = zip(alive[rows].tolist(), written[rows].tolist(), logprobs[rows].cpu().numpy(), strict=True)
        for row, tokens, log_p in found:
            end = tokens.index(eos) + 1 if eos in tokens else len(tokens)
            done[row] = tuple(tokens[:end]), log_p[:end].copy()

    for step in range(limit):
        log_p = log_distribution(reader.logits())
        if samples > 1 and step == 0:
            log_p = log_p.repeat_interleave(samples, dim=0)
            reader.repeat(samples)
        token = quantile(log_p, uniform[alive, step])
        logprobs = torch.cat([logprobs, log_p.gather(1, token[:, None])], dim=1)
        token = torch.where(ended, eos, token)
        written = torch.cat([written, token[:, None]], dim=1)
        ended |= token == eos
        if ended.all() or step == limit - 1:
            break
        reader.write(token)
        if ended.float().mean() >= 0.5:
            store(ended)
            rows = torch.nonzero(~ended)[:, 0]
            reader.keep(rows)
            alive, written, logprobs, ended = alive[rows], written[rows], logprobs[rows], ended[rows]
    store(torch.ones_like(ended))
    return done


def quantile(log_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(B,) tokens by the inverse of the distribution function: each row by its own number."""
    precise = torch.float32 if log_p.device.type == "mps" else torch.float64
    cumulative = log_p.to(precise).exp().cumsum(-1)
    target = uniform.to(precise) * cumulative[:, -1]
    token = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    last = log_p.shape[-1] - 1 - (log_p > -torch.inf).flip(-1).int().argmax(-1)
    return torch.minimum(token, last)


def right_padded(prompts: Prompts, pad: int, device: torch.device) -> torch.Tensor:
    """(B, T) token ids."""
    tokens = np.full((len(prompts), max(map(len, prompts))), pad, dtype=np.int64)
    for k, prompt in enumerate(prompts):
        tokens[k, : len(prompt)] = prompt
    return torch.from_numpy(tokens).to(device)


def _left_padded(prompts: Prompts, pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, prompts))
    tokens = np.full((len(prompts), width), pad, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for k, prompt in enumerate(prompts):
        tokens[k, width - len(prompt) :] = prompt
        mask[k, width - len(prompt) :] = 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)
