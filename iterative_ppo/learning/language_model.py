"""A policy that is a causal language model: load, sample, log-probs, save. Any Hugging Face causal LM serves."""

from __future__ import annotations

import logging as python_logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from iterative_ppo.config import LoRAConfig, PersonaConfig, PolicyConfig
from iterative_ppo.errors import ModelError, StoreError
from iterative_ppo.files import read_settings, write_json
from iterative_ppo.learning import adapters, distributed, last_layer, loading, runtime, sharding
from iterative_ppo.learning.batching import Batch, EncodedTable, inference_batches, response_positions
from iterative_ppo.learning.checkpoint import load_weights, weights_of
from iterative_ppo.learning.forward import backbone, own_logits, vocabulary_logits
from iterative_ppo.learning.last_layer import hidden_at
from iterative_ppo.learning.runtime import threads
from iterative_ppo.learning.sampling import (
    CachedReader,
    Reader,
    RereadingReader,
    Written,
    write_responses,
)
from iterative_ppo.learning.sequences import Prompts, portions, prompt_lengths
from iterative_ppo.learning.value_head import check_backbone
from iterative_ppo.mdp.conversation import State, Suggestion
from iterative_ppo.mdp.rendering import Renderer

__all__ = ["INFERENCE_TOKENS", "SETTINGS", "LanguagePolicy", "PolicySettings", "Responses", "threads"]

_LOG = python_logging.getLogger(__name__)
logging.disable_progress_bar()  # a bar for each loaded shard would hide ours

SETTINGS = "policy.json"
BASE = "base_weights"
"""Of a version that is adapters, beside its settings: the hash of their base, in older ones of its weights alone."""
FORMAT = 1
INFERENCE_TOKENS = 32_768
LOGITS = 2**26
"""Logits that are there at once where nothing is learnt: a quarter of a GiB, and a few times that until log-probs are.

A vocabulary of 150,000 has no room for those of all responses of a rollout.
"""


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
    """Sampled actions: token ids with the end of the turn where it came, each token's log-prob, and whether it came."""

    tokens: list[tuple[int, ...]]
    token_logprobs: list[np.ndarray]
    finished: np.ndarray

    @property
    def logprobs(self) -> np.ndarray:
        """(N,) log pi(a | s) of the whole responses."""
        return np.array([p.sum() for p in self.token_logprobs])


class LanguagePolicy:
    """pi(a | s): a causal LM, its tokenizer, and the settings under which it samples.

    Log-probs are sums over the response's tokens with the end of the turn, at the policy's own temperature, over the
    tokens that it may say: other special tokens than the end of the turn and the abstain token, and ids that are no
    token, are left out of the distribution, in sampling and in scoring alike.

    Args:
        adapter: the LoRA adapter in `model` that this policy speaks with; None is the model without any. Policies may
            share one model and differ in this alone, so call the model within `active()`.
        lora: how copies of it are trained; None trains all weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: PolicySettings,
        adapter: str | None = None,
        lora: LoRAConfig | None = None,
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.adapter, self.lora = adapter, lora
        self.renderer = Renderer(tokenizer, settings.max_prompt_tokens, settings.max_response_tokens, settings.abstain)
        pad = tokenizer.pad_token_id
        self.pad: int = self.renderer.eos if pad is None else pad
        model.eval()  # dropout would make log-probs and ratios noise
        said = {self.renderer.eos, *self.renderer.ids(settings.abstain)}
        banned = sorted(set(range(_rows(model))) - self.renderer.ordinary - said)
        self.banned = torch.tensor(banned, dtype=torch.long, device=model.device)

    @classmethod
    def load(
        cls,
        path: Path | str,
        settings: PolicySettings | None = None,
        device: str = "cpu",
        lora: LoRAConfig | None = None,
    ) -> LanguagePolicy:
        """Load a saved policy, or any causal LM given `settings`. Raises ModelError with the reason.

        Args:
            lora: train adapters of this rank, with the weights below them frozen (rank 0 or None: train all weights).
        """
        lora = lora if lora and lora.rank else None
        half = lora is not None and runtime.current().bfloat16  # frozen weights need no more; trained ones do
        model, tokenizer = loading.load_causal_lm(path, torch.bfloat16 if half else torch.float32)
        _check_base(Path(path))
        if settings is None:
            settings = read_policy_settings(Path(path))
        if not adapters.has_adapters(model):
            check_backbone(model, str(path))
        loading.check_fits(model, str(path), settings.max_prompt_tokens + settings.max_response_tokens)
        adapters.as_float32(model)
        adapters.check_loaded(model, str(path))
        for part in (model.get_output_embeddings(), *(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm))):
            part.float()  # on a CPU, none in bfloat16 reads what comes from an embedding that the head shares
        adapter = adapters.current(model)
        if lora and adapter:
            adapters.check_same(model, adapter, lora, path)
        if lora and not adapter:
            adapters.check(model, lora)
        policy = cls(model.to(device), tokenizer, settings, adapter, lora)
        loading.check_rows(model, str(path), policy.renderer.ids_in_use() | {policy.pad})
        _ = policy.abilities  # now, so that a model that cannot serve is refused before anything is done with it
        return policy

    def save(self, path: Path, weights: Literal["auto", "merged", "adapters"] = "merged") -> None:
        """Save weights (safetensors), tokenizer and settings into a directory that `load` reads.

        Args:
            weights: of a LoRA policy, full weights, or its adapter alone, which needs the base where it is; auto is the
                latter under bfloat16, of whose steps a small change of a weight is a fraction, over a base that is no
                version of ours: those come and go.
        """
        rounds = self.lora is not None and runtime.current().bfloat16
        if weights == "auto":
            over = self.model.name_or_path
            lasting = over and not (Path(over) / SETTINGS).exists()
            weights = "adapters" if rounds and lasting else "merged"
        if weights == "merged" and rounds:
            _LOG.warning(
                "saved merged: whoever computes in bfloat16, as here, rounds what is small of the adapters away; "
                "policy.save adapters keeps them apart, over a base that has to stay where it is"
            )
        if weights == "adapters" and self.lora and self.adapter is None:
            self.trainable_copy().save(path, weights)
            return
        if weights == "adapters" and self.adapter:
            with self.active(), torch.no_grad():
                self.model.save_pretrained(path)
            base = {BASE: loading.base_model(path)}
        else:
            self._plain_model().save_pretrained(path)
            base = {}
        loading.save_tokenizer(self.tokenizer, path)
        self._generation().save_pretrained(path)
        write_json(path / SETTINGS, asdict(self.settings) | base)

    def _generation(self) -> GenerationConfig:
        """How transformers' `generate`, and servers that read the same file, sample what this policy samples.

        The base model's own, with its top-p or penalties, would make another policy of the same weights.
        """
        return GenerationConfig(
            do_sample=True,
            temperature=self.settings.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=self.settings.max_response_tokens,
            suppress_tokens=self.banned.tolist() or None,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.renderer.eos,
            pad_token_id=self.pad,
        )

    @cached_property
    def abilities(self) -> loading.Abilities:
        """What its model's own code can do. Raises ModelError where it is no causal language model."""
        with self.active(), torch.no_grad():
            last_layer.prepare(self.model)  # before what is tried, so that it is tried too
            return loading.abilities(self.model, sorted(self.renderer.ordinary), self.pad)

    def active(self) -> AbstractContextManager[PreTrainedModel]:
        """The model with this policy's adapter on, for a block (adapters.switched)."""
        return adapters.switched(self.model, self.adapter)

    def at(self, temperature: float) -> LanguagePolicy:
        """The same weights, shared, sampling at another temperature."""
        return self._like(self.model, self.adapter, replace(self.settings, temperature=temperature))

    def led_by(self, persona: PersonaConfig) -> LanguagePolicy:
        """The same weights, shared, told to speak as a persona: a behaviour b, exact in its log-probs as any policy."""
        behaviour = self.at(self.settings.temperature * persona.temperature)
        behaviour.renderer.instruction = persona.instruction
        return behaviour

    def with_model(self, model: PreTrainedModel, adapter: str | None = None) -> LanguagePolicy:
        """The same policy with other weights of the same family."""
        return self._like(model, adapter, self.settings)

    def _like(self, model: PreTrainedModel, adapter: str | None, settings: PolicySettings) -> LanguagePolicy:
        other = LanguagePolicy(model, self.tokenizer, settings, adapter, self.lora)
        other.renderer.instruction = self.renderer.instruction
        if "abilities" in self.__dict__:
            other.__dict__["abilities"] = self.abilities
        return other

    def trainable_copy(self) -> LanguagePolicy:
        """A student that starts as this policy and may be trained without changing it.

        Under LoRA it shares the model and differs by an adapter of its own, switched on from now; else it is a copy.
        """
        if self.lora is None:
            return self.with_model(adapters.merged(self.model, self.adapter))
        return self.with_model(self.model, adapters.add(self.model, self.lora, self.adapter))

    def trainable_parameters(self) -> list[torch.nn.Parameter]:
        """What an optimizer may change: all weights, or this policy's adapter."""
        with self.active():
            return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def training_state(self) -> dict[str, torch.Tensor]:
        """What training changes, by name, for a checkpoint."""
        return weights_of(self._trained())

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `training_state` of a copy made in the same way gave. Raises StoreError for another's."""
        load_weights(self._trained(), state)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        with self.active():
            return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """Weights of the model without its vocabulary head, adapters merged: what a Q starts from."""
        state: dict[str, torch.Tensor] = backbone(self._plain_model()).state_dict()
        return state

    def _plain_model(self) -> PreTrainedModel:
        plain = not adapters.has_adapters(self.model)
        return self.model if plain else adapters.merged(self.model, self.adapter)

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
        status = "abstained" if not text or self.renderer.abstains(text) else "suggested"
        action = Suggestion("" if status == "abstained" else text, status)  # type: ignore[arg-type]
        exact = self.renderer.response(action) == tuple(tokens)
        return Suggestion(action.text, action.status, logprob if exact else None)

    @torch.inference_mode()
    def respond(
        self,
        prompts: Prompts,
        seed: int | np.random.Generator,
        progress: Callable[[int], None] | None = None,
        samples: int = 1,
    ) -> Responses:
        """Sample responses to prompts, `samples` to each, side by side; prompts of like length are read together.

        A response depends on the seed, the prompt and its place alone, not on its batch or on who samples it: several
        processes sample a share each, and all get all. A generator in place of the seed goes on from call to call, so
        that prompts may come a block at a time.
        """
        length = self.settings.max_response_tokens
        uniform = np.random.default_rng(seed).random((len(prompts), samples, length))
        found: dict[int, list[Written]] = {}
        lengths = prompt_lengths(prompts).tolist()
        order = sorted(range(len(prompts)), key=lambda i: -lengths[i])
        most = self.inference_tokens // samples, max(1, self._positions // samples)
        with self.active(), sharding.gathered(self.model):
            for chosen in portions(distributed.share(order), lengths, *most):
                reader = self._reader([prompts[i] for i in chosen])
                places = self._tensor(uniform[list(chosen)].reshape(-1, length))
                written = write_responses(reader, self.log_distribution, places, self.renderer.eos, samples)
                found |= {i: written[k * samples : (k + 1) * samples] for k, i in enumerate(chosen)}
                if progress:
                    progress(len(chosen))
        found = distributed.gathered(found)
        every = [response for i in range(len(prompts)) for response in found[i]]
        tokens = [t for t, _ in every]
        finished = np.array([bool(t) and t[-1] == self.renderer.eos for t in tokens], dtype=bool)
        return Responses(tokens, [p for _, p in every], finished)

    def _reader(self, prompts: Prompts) -> Reader:
        if self.abilities.cache:
            return CachedReader(self.model, prompts, self.pad)
        return RereadingReader(self.model, prompts, self.pad, self.abilities.plain_head)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        device = self.model.device
        return torch.from_numpy(values.astype(np.float32) if device.type == "mps" else values).to(device)

    def token_log_probs(self, batch: Batch, spans: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probs of the spans' response tokens, and which span each belongs to: both (N,), spans in order.

        Only the hidden states that predict a response token meet the vocabulary, some at a time where nothing is
        learnt from them.
        """
        span, sequence, position = response_positions(batch, spans)
        device = self.model.device
        row, at = torch.from_numpy(sequence).to(device), torch.from_numpy(position).to(device)
        tokens = batch.tokens.to(device)
        size = max(1, len(row)) if torch.is_grad_enabled() else self._positions
        said = tokens[row, at].split(size)
        with self.active() as model:
            if self.abilities.plain_head:
                hidden = hidden_at(model, tokens, row, at - 1).split(size)
                logits = (vocabulary_logits(model, part) for part in hidden)
            else:
                logits = iter(own_logits(model, tokens)[row, at - 1].split(size))
            found = [self._log_p(*pair) for pair in zip(logits, said, strict=True)]
        index = torch.from_numpy(np.searchsorted(spans, span)).to(device)
        return torch.cat(found), index

    def _log_p(self, logits: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
        return self.log_distribution(logits).gather(1, said[:, None])[:, 0]

    @property
    def inference_tokens(self) -> int:
        """Padded tokens of a batch where nothing is learnt: fewer where a family's own code has logits of them all."""
        return INFERENCE_TOKENS if self.abilities.plain_head else min(INFERENCE_TOKENS, self._positions)

    @property
    def _positions(self) -> int:
        """Whose logits may be there at once."""
        return max(1, LOGITS // _rows(self.model))

    def response_log_probs(self, batch: Batch, spans: np.ndarray) -> torch.Tensor:
        """(S,) log pi(a | s) of whole responses."""
        log_p, index = self.token_log_probs(batch, spans)
        return log_p.new_zeros(len(spans)).index_add(0, index, log_p)

    @torch.inference_mode()
    def score(self, encoded: EncodedTable) -> np.ndarray:
        """(rows,) log pi(a_i | s_i) of all logged actions of a table; NaN where there is none."""
        result = np.full(encoded.rows, np.nan)
        for batch in inference_batches(encoded.sequences, self.inference_tokens, self.pad):
            spans = np.flatnonzero(batch.trains)
            if len(spans):
                result[batch.row[spans]] = self.response_log_probs(batch, spans).cpu().numpy()
        return result


def _rows(model: PreTrainedModel) -> int:
    """How many tokens its vocabulary head tells apart; more than the tokenizer has, where rows were added for speed."""
    return int(model.get_output_embeddings().weight.shape[0])


def read_policy_settings(place: Path) -> PolicySettings:
    """Of a saved policy. Raises StoreError where they are damaged or newer than this program."""
    path = place / SETTINGS
    values = read_settings(path, FORMAT)
    try:
        return PolicySettings(**{name: value for name, value in values.items() if name != BASE})
    except TypeError as error:
        raise StoreError(f"{path}: not a policy's settings ({error})") from None


def _check_base(path: Path) -> None:
    """Raise ModelError where another model lies where the base of a version's adapters was."""
    if not (path / SETTINGS).exists() or loading.base_of(path) is None:
        return
    known = read_settings(path / SETTINGS, FORMAT).get(BASE)
    if known and known not in (loading.base_model(path), loading.base_weights(path)):
        raise ModelError(
            f"{path}: adapters of {loading.base_of(path)}, whose weights or config.json are not those that they were "
            "trained on; put those back, or make the policy anew, saved merged if the base is to change"
        )
