"""The last layer at the positions that are read: the same values and gradients as a whole pass, whatever the family."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from iterative_ppo.learning import last_layer
from iterative_ppo.learning.forward import last_hidden
from iterative_ppo.learning.language_model import LanguagePolicy
from iterative_ppo.learning.sampling import CachedReader
from tests.real_models import FAMILIES, SIZES

MORE: dict[str, dict[str, Any]] = {
    "mixtral": SIZES | {"num_local_experts": 4},
    "mistral": SIZES | {"sliding_window": 4},
    "bloom": {"hidden_size": 16, "n_layer": 2, "n_head": 2},
    "phi3": SIZES | {"pad_token_id": 0},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "initializer_range": 0.2},
    "jamba": SIZES,
}
LEFT_OUT = {
    "llama": {"self_attn.q_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm"},
    "gpt2": {"attn.c_proj", "attn.resid_dropout", "mlp", "ln_2"},
    "bloom": {"self_attention.dense", "mlp", "post_attention_layernorm"},
    "mamba": {"mixer.out_proj"},
}


def model_of(family: str) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, vocab_size=60, **(FAMILIES | MORE)[family])
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that are read at their end, here and there, at their first position, and once."""
    tokens = torch.randint(60, (4, 30), generator=torch.Generator().manual_seed(1))
    wanted = torch.zeros(4, 30, dtype=torch.bool)
    wanted[0, 24:] = wanted[1, [3, 11, 12]] = wanted[2, [0, 7]] = wanted[3, 29] = True
    return tokens, wanted


def gradients(model: PreTrainedModel, read: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (read * torch.linspace(-1, 1, read.numel()).reshape(read.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def hooked(model: PreTrainedModel) -> set[str]:
    """Parts of the last layer that are given some positions alone."""
    layer = last_layer._last(model)
    assert layer is not None
    return {name for name, part in layer.named_modules() if name and part._forward_pre_hooks}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE])
def test_what_is_read_is_that_of_a_whole_pass(family: str) -> None:
    """A position that is read twice, as Q's at the end of a turn may be, counts twice."""
    model, (tokens, wanted) = model_of(family), batch()
    row, at = (torch.cat([x, x[:2]]) for x in wanted.nonzero(as_tuple=True))
    expected = last_hidden(model, tokens)[row, at]
    aim = {name: value.clone() for name, value in gradients(model, expected).items()}
    last_layer.prepare(model)
    assert LEFT_OUT.get(family, hooked(model)) == hooked(model)
    assert hooked(model)
    read = last_layer.hidden_at(model, tokens, row, at)
    assert torch.allclose(read, expected, atol=1e-5)
    for name, value in gradients(model, read).items():
        assert torch.allclose(value, aim[name], atol=1e-5 * float(1 + aim[name].abs().max())), name
    assert torch.allclose(last_hidden(model, tokens)[row, at], expected, atol=1e-6), "a whole pass is as before"


class Queries(TorchFunctionMode):
    """Counts the queries of each attention."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.counts.append(args[0].shape[2])
        return func(*args, **kwargs or {})


def test_attention_has_the_queries_that_are_read() -> None:
    model, (tokens, wanted) = model_of("llama"), batch()
    last_layer.prepare(model)
    with Queries() as seen:
        last_layer.hidden_at(model, tokens, *wanted.nonzero(as_tuple=True))
        last_layer.hidden_at(model, tokens, *torch.ones_like(wanted).nonzero(as_tuple=True))
    assert seen.counts == [30, 6, 30, 30], "where all are read, none is left out"


def test_weights_that_are_zero_now_hide_nothing() -> None:
    """A layer that begins as the identity gives the same whatever its keys and values are, until it has learnt."""
    model, (tokens, wanted) = model_of("llama"), batch()
    layer: Any = last_layer._last(model)
    learnt = layer.self_attn.o_proj.weight.detach().clone()
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
    last_layer.prepare(model)
    assert hooked(model) == LEFT_OUT["llama"]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.copy_(learnt)
        found = last_layer.hidden_at(model, tokens, *wanted.nonzero(as_tuple=True))
        assert torch.allclose(found, last_hidden(model, tokens)[wanted], atol=1e-5)


def test_a_copy_needs_no_preparation() -> None:
    model, (tokens, wanted) = model_of("llama"), batch()
    last_layer.prepare(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        found = last_layer.hidden_at(other, tokens, *wanted.nonzero(as_tuple=True))
        assert torch.allclose(found, last_hidden(other, tokens)[wanted], atol=1e-5)
        assert not torch.allclose(found, last_hidden(model, tokens)[wanted], atol=1e-2)
    last_layer.prepare(other)
    assert hooked(other) == LEFT_OUT["llama"]
    assert all(
        len(part._forward_pre_hooks) == 1 for part in last_layer._last(other).children() if part._forward_pre_hooks
    )


def test_the_first_token_after_prompts_of_any_length(tiny_policy: LanguagePolicy) -> None:
    """Padded on the left, with a cache that the response goes on from."""
    model, pad = tiny_policy.model, tiny_policy.pad
    last_layer.prepare(model)
    tokens = torch.randint(10, 40, (12,), generator=torch.Generator().manual_seed(2)).tolist()
    prompts = [tuple(tokens), tuple(tokens[:5]), tuple(tokens[3:4])]
    with torch.no_grad():
        reader = CachedReader(model, prompts, pad)
        first = reader.last()
        reader.write(torch.tensor([7, 8, 9]))
        second = reader.last()
        for k, prompt in enumerate(prompts):
            expected = last_hidden(model, torch.tensor([[*prompt, 7 + k]]))[0, -2:]
            assert torch.allclose(torch.stack([first[k], second[k]]), expected, atol=1e-5)
