"""A policy that is a causal language model: load, sample, log-probs, save. Any Hugging Face causal LM serves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from iterative_ppo.config import PolicyConfig
from iterative_ppo.errors import ModelError, StoreError
from iterative_ppo.files import read_settings, write_json
from iterative_ppo.learning.batching import Batch, EncodedTable, inference_batches, response_positions
from iterative_ppo.mdp.conversation import State, Suggestion
from iterative_ppo.mdp.rendering import Renderer

logging.disable_progress_bar()  # a bar for each loaded shard would hide ours

SETTINGS = "policy.json"
FORMAT = 1
INFERENCE_TOKENS = 32_768


@dataclass(frozen=True)
class PolicySettings:
    """What makes a policy version beside its weights and tokenizer."""

    temperature: float
    max_prompt_tokens: int
    max_response_tokens: int
    abstain: str
    format: int = FORMAT

    @classmethod
    def of(cls, config: PolicyConfig) -> PolicySettings:
        return cls(config.temperature, config.max_prompt_tokens, config.max_response_tokens, config.abstain)


@dataclass(frozen=True)
class Responses:
    """Sampled actions: token ids with the end of sequence where it came, summed log-probs, and whether it came."""

    tokens: list[tuple[int, ...]]
    logprobs: np.ndarray
    finished: np.ndarray


class LanguagePolicy:
    """pi(a | s): a causal LM, its tokenizer, and the settings under which it samples.

    Log-probs are sums over the response's tokens with the end of sequence, at the policy's own temperature, over the
    tokens that it may say: other special tokens than the end of sequence and the abstain token are left out of the
    distribution, in sampling and in scoring alike.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: PolicySettings) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.renderer = Renderer(tokenizer, settings.max_prompt_tokens, settings.max_response_tokens, settings.abstain)
        pad = tokenizer.pad_token_id
        self.pad: int = tokenizer.eos_token_id if pad is None else pad
        model.eval()  # dropout would make log-probs and ratios noise
        said = {tokenizer.eos_token_id, *self.renderer.ids(settings.abstain)}
        banned = [i for i in tokenizer.all_special_ids if i not in said]
        self.banned = torch.tensor(banned, dtype=torch.long, device=model.device)

    @classmethod
    def load(cls, path: Path | str, settings: PolicySettings | None = None, device: str = "cpu") -> LanguagePolicy:
        """Load a saved policy, or any causal LM given `settings`. Raises ModelError with the reason."""
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(str(path))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"{path}: not a causal language model that can be loaded offline ({reason})") from None
        if settings is None:
            settings = _read_settings(Path(path) / SETTINGS)
        return cls(model.to(device), tokenizer, settings)

    def save(self, path: Path) -> None:
        """Save weights (safetensors), tokenizer and settings into a directory that `load` reads."""
        self.model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        write_json(path / SETTINGS, asdict(self.settings))

    def log_distribution(self, logits: torch.Tensor) -> torch.Tensor:
        """(..., V) logits to log-probs at the policy's temperature, over the tokens that a response may hold."""
        logits = logits.float() / self.settings.temperature
        if len(self.banned):
            logits = logits.index_fill(-1, self.banned, -torch.inf)
        return torch.log_softmax(logits, dim=-1)

    def sample(
        self, states: Sequence[State], seed: int, progress: Callable[[int], None] | None = None
    ) -> list[Suggestion]:
        """One suggestion a state, with its log-prob as sampled.

        The log-prob is None where the text does not spell the sampled tokens (cut at the limit, or tokens that the
        tokenizer would write otherwise): such an action cannot be scored again, so it claims no behaviour log-prob.
        """
        prompts = [self.renderer.prompt(state).tokens for state in states]
        responses = self.respond(prompts, seed, progress)
        return [self.suggestion(t, float(p)) for t, p in zip(responses.tokens, responses.logprobs, strict=True)]

    def suggestion(self, tokens: tuple[int, ...], logprob: float | None = None) -> Suggestion:
        """Sampled tokens as an action."""
        ended = bool(tokens) and tokens[-1] == self.renderer.eos
        text: Any = self.tokenizer.decode(list(tokens[:-1] if ended else tokens), skip_special_tokens=False)
        text = text.strip()
        status = "abstained" if not text or self.settings.abstain in text else "suggested"
        action = Suggestion("" if status == "abstained" else text, status)  # type: ignore[arg-type]
        exact = self.renderer.response(action) == tuple(tokens)
        return Suggestion(action.text, action.status, logprob if exact else None)

    @torch.inference_mode()
    def respond(
        self, prompts: Sequence[tuple[int, ...]], seed: int, progress: Callable[[int], None] | None = None
    ) -> Responses:
        """Sample one response a prompt, with a key-value cache, prompts of like length together."""
        generator = torch.Generator(device=self.model.device).manual_seed(seed)
        tokens: list[tuple[int, ...]] = [()] * len(prompts)
        logprobs = np.zeros(len(prompts))
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for chosen in _chunks(order, prompts, INFERENCE_TOKENS):
            for i, (response, logprob) in zip(
                chosen, self._generate([prompts[i] for i in chosen], generator), strict=True
            ):
                tokens[i], logprobs[i] = response, logprob
            if progress:
                progress(len(chosen))
        finished = np.array([bool(t) and t[-1] == self.renderer.eos for t in tokens], dtype=bool)
        return Responses(tokens, logprobs, finished)

    def _generate(
        self, prompts: Sequence[tuple[int, ...]], generator: torch.Generator
    ) -> list[tuple[tuple[int, ...], float]]:
        """Token by token; rows that have ended leave the batch once they are half of it."""
        inputs, mask = _left_padded(prompts, self.pad, self.model.device)
        done: list[tuple[tuple[int, ...], float]] = [((), 0.0)] * len(prompts)
        alive = torch.arange(len(prompts), device=inputs.device)
        position = mask.cumsum(1) - 1
        written = torch.zeros((len(prompts), 0), dtype=torch.long, device=inputs.device)
        total = torch.zeros(len(prompts), device=inputs.device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=inputs.device)
        cache = None
        for step in range(self.settings.max_response_tokens):
            out = self.model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=position.clamp_min(0),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            log_p = self.log_distribution(out.logits[:, -1])
            token = torch.multinomial(log_p.exp(), 1, generator=generator)
            total += torch.where(ended, 0.0, log_p.gather(1, token)[:, 0])
            token = torch.where(ended[:, None], self.renderer.eos, token)
            written = torch.cat([written, token], dim=1)
            ended |= token[:, 0] == self.renderer.eos
            if ended.all() or step == self.settings.max_response_tokens - 1:
                break
            inputs, position = token, position[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            if ended.float().mean() >= 0.5:
                self._store(done, alive[ended], written[ended], total[ended])
                keep = torch.nonzero(~ended)[:, 0]
                cache.batch_select_indices(keep)
                alive, inputs, mask, position = alive[keep], inputs[keep], mask[keep], position[keep]
                written, total, ended = written[keep], total[keep], ended[keep]
        self._store(done, alive, written, total)
        return done

    def _store(
        self, done: list[tuple[tuple[int, ...], float]], rows: torch.Tensor, written: torch.Tensor, total: torch.Tensor
    ) -> None:
        for row, tokens, logprob in zip(rows.tolist(), written.tolist(), total.tolist(), strict=True):
            end = tokens.index(self.renderer.eos) + 1 if self.renderer.eos in tokens else len(tokens)
            done[row] = tuple(tokens[:end]), logprob

    def token_log_probs(self, batch: Batch, spans: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the spans' response tokens, and which span each belongs to: both (N,), spans in order.

        Only the hidden states that predict a response token meet the vocabulary.
        """
        span, sequence, position = response_positions(batch, spans)
        device = self.model.device
        hidden = last_hidden(self.model, batch.tokens.to(device))
        chosen = hidden[torch.from_numpy(sequence).to(device), torch.from_numpy(position - 1).to(device)]
        log_p = self.log_distribution(vocabulary_logits(self.model, chosen))
        target = batch.tokens[torch.from_numpy(sequence), torch.from_numpy(position)].to(device)
        index = torch.from_numpy(np.searchsorted(spans, span)).to(device)
        return log_p.gather(1, target[:, None])[:, 0], index

    def response_log_probs(self, batch: Batch, spans: np.ndarray) -> torch.Tensor:
        """(S,) log pi(a | s) of whole responses."""
        log_p, index = self.token_log_probs(batch, spans)
        return log_p.new_zeros(len(spans)).index_add(0, index, log_p)

    @torch.inference_mode()
    def score(self, encoded: EncodedTable) -> np.ndarray:
        """(rows,) log pi(a_i | s_i) of all logged actions of a table; NaN where there is none."""
        result = np.full(encoded.rows, np.nan)
        for batch in inference_batches(encoded.sequences, INFERENCE_TOKENS, self.pad):
            spans = np.flatnonzero(batch.trains)
            if len(spans):
                result[batch.row[spans]] = self.response_log_probs(batch, spans).cpu().numpy()
        return result


def last_hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, H) hidden states that the vocabulary head reads."""
    hidden: torch.Tensor = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def vocabulary_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """(..., V) logits of hidden states, with the scaling that some families apply after the head."""
    config = model.config.get_text_config()
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def _read_settings(path: Path) -> PolicySettings:
    try:
        return PolicySettings(**read_settings(path, FORMAT))
    except TypeError as error:
        raise StoreError(f"{path}: not a policy's settings ({error})") from None


def _chunks(order: Sequence[int], prompts: Sequence[tuple[int, ...]], tokens: int) -> Iterator[Sequence[int]]:
    begin = 0
    while begin < len(order):
        size = max(1, tokens // max(1, len(prompts[order[begin]])))
        yield order[begin : begin + size]
        begin += size


def _left_padded(
    prompts: Sequence[tuple[int, ...]], pad: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(prompt) for prompt in prompts)
    tokens = np.full((len(prompts), width), pad, dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for k, prompt in enumerate(prompts):
        tokens[k, width - len(prompt) :] = prompt
        mask[k, width - len(prompt) :] = 1
    return torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch threads for a block; more than the free cores makes it slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
