"""Forward passes of any causal LM: hidden states, logits in float32, and what a family's own code can do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from iterative_ppo.errors import ModelError
from iterative_ppo.learning import runtime


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its vocabulary head; a family's own name for it may be another, as Llama 4's is."""
    base: Any = model.base_model
    if base is model:
        base = next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    found: PreTrainedModel = base
    return found


def last_hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, H) hidden states that the vocabulary head reads."""
    with checkpointed(model):
        hidden: torch.Tensor = backbone(model)(input_ids=tokens, use_cache=False).last_hidden_state
    return hidden


def vocabulary_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """(..., V) logits of hidden states, with the scaling that some families apply after the head.

    They are float32 under autocast too: bfloat16 has three digits, and a log-prob needs them after the point.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    with torch.autocast(hidden.device.type, enabled=False):
        logits: torch.Tensor = head(hidden.to(head.weight.dtype)).float()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if scaling := getattr(config, "logits_scaling", None):
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):
        logits = torch.tanh(logits / cap) * cap
    return logits


def own_logits(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """(B, T, V) logits as the family's own code computes them."""
    with checkpointed(model):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float()


def check_checkpointing(model: PreTrainedModel) -> None:
    """Raise ModelError where the runtime asks for gradient checkpointing of a family that has none."""
    able = model.supports_gradient_checkpointing and _checkpointing_layers(model)
    if runtime.current().gradient_checkpointing and not able:
        name = model.config.model_type
        raise ModelError(
            f"{name}: has no gradient checkpointing in transformers; set runtime.gradient_checkpointing=false"
        )


def _checkpointing_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


@contextlib.contextmanager
def checkpointed(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, activations are not stored but computed anew in the backward pass, where the runtime says so.

    Only the layers' own flag says `training`, and only here: dropout stays off, and sampling keeps its cache, which
    transformers drops for a layer that checkpoints. Raises ModelError for a family that has no such layers.
    """
    if not (runtime.current().gradient_checkpointing and torch.is_grad_enabled()):
        yield
        return
    check_checkpointing(model)
    if not model.is_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = _checkpointing_layers(model)
    for layer in layers:
        layer.training = True
        for name, value in vars(layer).items():
            if "dropout" in name and isinstance(value, float):
                setattr(layer, name, 0.0)
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def holds(check: Callable[[], bool]) -> bool:
    """Whether what is tried of a family's code holds; what it raises says that it does not."""
    try:
        return check()
    except Exception:  # a family's own code raises what it likes where it does not know an argument
        return False


def alike(found: torch.Tensor, expected: torch.Tensor, model: PreTrainedModel) -> bool:
    """Equal up to the rounding of the precision that the model computes in."""
    exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(found.device.type)
    difference = (found.float() - expected.float()).abs().mean()
    return bool(difference <= (1e-3 if exact else 5e-2) * expected.float().std())
