"""A causal LM and its tokenizer from a directory or a name, refused before any training where they cannot serve."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from iterative_ppo.errors import ModelError, StoreError
from iterative_ppo.files import content_hash, fingerprint, read_json, write_json
from iterative_ppo.learning.forward import alike, holds, last_hidden, own_logits, vocabulary_logits
from iterative_ppo.learning.sampling import CachedReader, right_padded

ADAPTERS = "adapter_config.json"
TOKENIZER = "tokenizer_config.json"
OF_THE_WRITER = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""What a config.json says of who wrote it, and how; the same model may say otherwise."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Abilities:
    """What holds for a family's code: logits are the head of the hidden states; a padded batch reads from a cache."""

    plain_head: bool
    cache: bool


def load_causal_lm(path: Path | str, dtype: torch.dtype) -> tuple[Any, PreTrainedTokenizerBase]:
    """Weights and tokenizer; a directory of adapters brings its base. Raises ModelError with the reason."""
    there = Path(path).exists()
    source = str(Path(path).resolve()) if there else str(path)
    if not there and (Path(path).is_absolute() or source.startswith((".", "~"))):
        raise ModelError(f"{path}: no such directory; expected the path or the name of a causal language model")
    _check_no_pickles(Path(path))
    _check_base(Path(path))
    what = "a causal language model that can be loaded offline"
    model = with_weights(AutoModelForCausalLM, source, path, dtype, what)
    base = base_of(Path(path)) if there and not (Path(path) / TOKENIZER).exists() else None
    return model, _tokenizer(base or source)


def _tokenizer(source: Path | str) -> PreTrainedTokenizerBase:
    """Raises ModelError where there is none; of some families transformers then makes one that knows no text."""
    what = "a folder with its model's tokenizer, which is in files such as tokenizer.json"
    found = tried(lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=False), source, what)
    if not found.get_vocab().keys() - found.get_added_vocab().keys():
        raise ModelError(f"{source}: not {what}; put them there")
    return found


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Save it so that it reads a text as it does now: transformers leaves out how Llama's first word begins."""
    tokenizer.save_pretrained(path)
    legacy = getattr(tokenizer, "legacy", None)
    if legacy is not None:
        write_json(path / TOKENIZER, read_json(path / TOKENIZER) | {"legacy": legacy})


def with_weights(kind: Any, source: str, path: Path | str, dtype: torch.dtype, what: str) -> Any:
    """A model of a transformers class from safetensors, which cannot hold code; `path` is what errors name.

    A file that holds more than the model has a place for is told of: a value head does no harm, another layer does.

    Raises ModelError where it cannot be loaded, stays quantized, or a weight is missing or is not a number.
    """
    how = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
    model, info = tried(lambda: kind.from_pretrained(source, **how), path, what)
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{path}: its weights lack {missing[0]} and {len(missing) - 1} more that {type(model).__name__} needs; "
            f"expected the checkpoint of {what.partition(' that ')[0]} with its head"
        )
    if more := sorted(info["unexpected_keys"]):
        _LOG.warning(
            "%s: its file holds %s and %d more that %s has no place for, so they are left out; check that its "
            "config.json is that of its weights",
            path,
            more[0],
            len(more) - 1,
            type(model).__name__,
        )
    _check_plain(model, path)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise ModelError(
                f"{path}: its weight {name} holds values that are not finite numbers, so the file is damaged or its "
                "training diverged; take another copy"
            )
    return model


def _check_plain(model: Any, path: Path | str) -> None:
    """Raise ModelError where weights are quantized; where transformers has read them as plain ones, keep them so."""
    if getattr(model.config, "quantization_config", None):
        raise ModelError(
            f"{path}: its weights are quantized (quantization_config in config.json), and such weights are neither "
            "trained nor saved here; take the model in full precision"
        )
    steps = getattr(model, "_weight_conversions", None) or []
    if any(hasattr(part, "hf_quantizer") for step in steps for part in getattr(step, "operations", ())):
        del model._weight_conversions  # saving would quantize again, and not say so


def tried(load: Callable[[], Any], path: Path | str, what: str) -> Any:
    """What a loader of transformers gives. Raises ModelError with its reason: `path` is not `what`."""
    try:
        return load()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file meets any of their checks, or none
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which is not run; take a model of a family that transformers knows"
        raise ModelError(f"{path}: not {what} ({reason})") from None


def _check_no_pickles(path: Path) -> None:
    name = "adapter_model" if (path / ADAPTERS).exists() else "*"
    if list(path.glob(f"{name}.bin")) and not list(path.glob(f"{name}.safetensors")):
        raise ModelError(f"{path}: its weights are pickles, which may hold code; save them as safetensors")


def _check_base(path: Path) -> None:
    base = base_of(path)
    if base and base.is_absolute() and not base.exists():
        raise ModelError(f"{path}: adapters of {base}, which is not there; put the base back, or save policies merged")


def base_of(path: Path) -> Path | None:
    """The model that a directory of adapters names, by path or by name; None where it holds none or names none.

    Raises ModelError where its configuration is none of peft's.
    """
    if not (path / ADAPTERS).exists():
        return None
    try:
        base = read_json(path / ADAPTERS).get("base_model_name_or_path")
    except (StoreError, AttributeError) as error:
        raise ModelError(f"{path / ADAPTERS}: not a peft configuration ({error})") from None
    return Path(base) if base else None


def base_weights(path: Path) -> str | None:
    """The hash of the weights below a directory of adapters; None where they are in no directory here."""
    base = base_of(path)
    if base is None or not base.is_dir():
        return None
    index = base / SAFE_WEIGHTS_INDEX_NAME
    parts = set(read_json(index)["weight_map"].values()) if index.exists() else {SAFE_WEIGHTS_NAME}
    files = [base / part for part in sorted(parts) if (base / part).exists()]
    return _hash_of(tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files))


def base_model(path: Path) -> str | None:
    """The hash of the weights and the configuration below a directory of adapters; None where base_weights is."""
    weights, base = base_weights(path), base_of(path)
    if weights is None or base is None:
        return None
    config = read_json(base / CONFIG_NAME)
    return fingerprint(weights, {key: value for key, value in config.items() if key not in OF_THE_WRITER})


@lru_cache(maxsize=8)
def _hash_of(files: tuple[tuple[str, int, int], ...]) -> str:
    """Of files as they were at a time: a large base is read once by a process."""
    return fingerprint([content_hash(Path(name)) for name, _, _ in files])


def context(model: PreTrainedModel) -> int | None:
    """How many tokens a model reads at most; None where its configuration sets no limit."""
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "max_seq_len"))
    return next((limit for limit in found if limit and limit > 0), None)  # XLNet says -1 where it has none


def steady_context(model: PreTrainedModel) -> int | None:
    """Beyond how many tokens the longest text of a batch changes how all of it is read; None where it never does.

    LongRoPE (arXiv 2402.13753) has a second set of frequencies for longer texts, and takes one for the whole batch.
    """
    rope: dict[str, Any] = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # or a set for each kind of layer
    limits = [part.get("original_max_position_embeddings") for part in parts if part.get("rope_type") == "longrope"]
    return min((limit for limit in limits if limit), default=None)


def check_fits(model: PreTrainedModel, name: str, tokens: int) -> None:
    """Raise ModelError where a prompt with its response is more than the model reads, or reads alike in any batch."""
    asked = f"policy.max_prompt_tokens + policy.max_response_tokens is {tokens}; lower them"
    limit, steady = context(model), steady_context(model)
    if limit and tokens > limit:
        raise ModelError(f"{name}: its context is {limit} tokens, but {asked}")
    if steady and tokens > steady:
        raise ModelError(
            f"{name}: beyond {steady} tokens its LongRoPE makes a text's log-prob depend on what else is in the batch, "
            f"but {asked}"
        )


def check_rows(model: PreTrainedModel, name: str, ids: set[int]) -> None:
    """Raise ModelError where the model has no row for one of the ids that its texts hold.

    A tokenizer may know more: Gemma's has a token for images that its text models do not embed.
    """
    layers: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    rows, largest = min(layer.weight.shape[0] for layer in layers), max(ids)
    if largest >= rows:
        raise ModelError(
            f"{name}: texts hold token ids up to {largest}, the model embeds {rows}; they do not match, so take the "
            "tokenizer that the model was trained with"
        )


@torch.inference_mode()
def abilities(model: PreTrainedModel, ordinary: list[int], pad: int) -> Abilities:
    """Try two short texts of different length: what differs from the model's own logits is not used.

    Args:
        ordinary: token ids of which the texts are made.

    Raises ModelError where a token's logits depend on what follows it.
    """
    drawn = torch.randint(len(ordinary), (18,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [ordinary[k] for k in drawn]
    texts, prompts = [tuple(ids[:10]), tuple(ids[10:])], [tuple(ids[:7]), tuple(ids[10:15])]
    device, name = model.device, model.name_or_path or model.config.model_type
    begin = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    rows, at = torch.arange(2, device=device)[:, None], begin[:, None] + torch.arange(3, device=device)
    padded = right_padded(texts, pad, device)
    try:
        expected = own_logits(model, padded)[rows, at]
    except Exception as error:  # see holds
        raise ModelError(f"{name}: fails on a short text ({' '.join(str(error).split())[:200]})") from error
    if not torch.isfinite(expected).any():
        raise ModelError(f"{name}: its logits are not numbers, so its weights are damaged or its training diverged")
    alone = torch.stack([own_logits(model, right_padded([prompt], pad, device))[0, -1] for prompt in prompts])
    if not alike(alone, expected[:, 0], model):
        raise ModelError(f"{name}: what it says after a text depends on what follows; expected a causal language model")

    def plain() -> bool:
        return alike(vocabulary_logits(model, last_hidden(model, padded)[rows, at]), expected, model)

    def cached() -> bool:
        reader, twice = CachedReader(model, prompts, pad), torch.tensor([0, 0, 1, 1], device=device)
        first = reader.logits()
        reader.repeat(2)
        reader.write(padded[twice, begin[twice] + 1])
        second = reader.logits()
        reader.write(padded[twice, begin[twice] + 2])
        reader.keep(torch.tensor([0, 2], device=device))
        found = torch.cat([first, second, reader.logits()])
        return alike(found, torch.cat([expected[:, 0], expected[twice, 1], expected[:, 2]]), model)

    plain_head = holds(plain)
    cache = plain_head and holds(cached)
    if not cache:
        _LOG.warning(
            "%s: samples without a key-value cache, which is slower; its own does not serve batches here", name
        )
    return Abilities(plain_head, cache)
