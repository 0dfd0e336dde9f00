"""The last layer at the positions that are read.

Of a prompt, the last layer gives a response no more than keys and values: its attention's queries, and what comes after
attention, are computed where somebody reads them, and left out elsewhere. Of a model of two layers that is a third of
the work; of forty it is little.

transformers has no interface for it, so what comes after attention is tried part by part, once for a model: in the
place of what would be left out stand values that are no numbers, and a part through which one of them reaches a
position that is read stays whole. What comes before attention is not tried, for it may choose what attention sees of a
long text in a way that no short one shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from iterative_ppo.learning import runtime
from iterative_ppo.learning.forward import alike, holds, last_hidden

PREPARED = "_last_layer_prepared"
_READ: ContextVar[Read | None] = ContextVar("read", default=None)


class Read(TorchFunctionMode):
    """Which positions of a batch are read, while its forward pass runs.

    Args:
        wanted: (B, T) bool, true somewhere.
        left_out: the value elsewhere.
        whole: parts get and give all positions, of which the others have that value.
    """

    def __init__(self, wanted: torch.Tensor, left_out: float = 0.0, whole: bool = False) -> None:
        super().__init__()
        self.wanted, self.shape, self.left_out, self.whole = wanted, wanted.shape, left_out, whole
        self.row, self.at = wanted.nonzero(as_tuple=True)
        count = wanted.sum(dim=1)
        self.slot = torch.arange(len(self.row), device=wanted.device) - (count.cumsum(0) - count)[self.row]
        self.columns = self.at.new_zeros(len(wanted), int(count.max()))
        """(B, L) the positions of each row, one after the other."""
        self.columns[self.row, self.slot] = self.at
        self.within = self.used = False
        self.attentions = 0
        """Of the last layer, so far."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.within and func is scaled_dot_product_attention:
            return self._attention(*args, **kwargs or {})
        return func(*args, **kwargs or {})

    def narrow(self, value: Any) -> Any:
        """(B, T, ...) to (1, N, ...); anything else as it is."""
        if not _begins(value, self.shape):
            return value
        self.used = True
        return self._marked(value) if self.whole else value[self.row, self.at][None]

    def widen(self, value: Any) -> Any:
        """(1, N, ...) to (B, T, ...); anything else as it is."""
        if self.whole:
            return self._marked(value) if _begins(value, self.shape) else value
        return self._spread(value[0]) if _begins(value, (1, len(self.row))) else value

    def _marked(self, value: torch.Tensor) -> torch.Tensor:
        others = ~self.wanted.reshape(*self.shape, *[1] * (value.ndim - 2))
        return value.masked_fill(others, self.left_out) if value.is_floating_point() else value

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        whole = values.new_full((*self.shape, *values.shape[1:]), self.left_out)
        whole[self.row, self.at] = values
        return whole

    def _rows(self, heads: torch.Tensor) -> torch.Tensor:
        """(B, H, T, X) to (B, H, L, X)."""
        each = torch.arange(len(self.columns), device=heads.device)[:, None]
        return heads.transpose(1, 2)[each, self.columns].transpose(1, 2)

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **how: Any,
    ) -> torch.Tensor:
        batch, length = self.shape
        whole = attn_mask is not None and (attn_mask.ndim != 4 or attn_mask.shape[2] != length)
        if query.ndim != 4 or query.shape[0] != batch or query.shape[2] != length or whole:
            return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **how)
        self.attentions += 1
        if is_causal:
            attn_mask = (torch.arange(key.shape[2], device=key.device) <= self.columns[:, :, None])[:, None]
        elif attn_mask is not None:
            attn_mask = self._rows(attn_mask.expand(batch, -1, -1, -1))
        found = scaled_dot_product_attention(self._rows(query), key, value, attn_mask, dropout_p, **how)
        return self._spread(found.transpose(1, 2)[self.row, self.slot]).transpose(1, 2)


def _begins(value: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 2 and tuple(value.shape[:2]) == tuple(shape)


def hidden_at(model: PreTrainedModel, tokens: torch.Tensor, row: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """(N, H) what the vocabulary head reads at (N,) positions of a batch (B, T)."""
    wanted = torch.zeros(tokens.shape, dtype=torch.bool, device=tokens.device)
    wanted[row, at] = True
    with read_at(model, wanted):
        return last_hidden(model, tokens)[row, at]


@contextlib.contextmanager
def read_at(model: PreTrainedModel, wanted: torch.Tensor) -> Iterator[None]:
    """For a block, forward passes of a prepared model on a batch whose hidden states are read where `wanted` says.

    Elsewhere they mean nothing. All are computed where most are wanted, or activations are to be computed anew.

    Args:
        wanted: (B, T) bool.
    """
    anew = runtime.current().gradient_checkpointing and torch.is_grad_enabled()
    few = wanted.shape[1] > 1 and 0 < 2 * int(wanted.sum()) <= wanted.numel()  # whoever writes a token reads it
    with _reading(Read(wanted)) if few and not anew and hasattr(model, PREPARED) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _reading(read: Read) -> Iterator[Read]:
    before = _READ.set(read)
    try:
        with read:
            yield read
    finally:
        _READ.reset(before)


@torch.no_grad()
def prepare(model: PreTrainedModel) -> None:
    """Find, once for a model and its copies, what of its last layer may be left out."""
    if not hasattr(model, PREPARED):
        setattr(model, PREPARED, True)
        layer, hooks = _last(model), list[RemovableHandle]()
        if layer is not None and not holds(lambda: _prepared(model, layer, hooks)):
            _remove(hooks)


def _prepared(model: PreTrainedModel, layer: torch.nn.Module, hooks: list[RemovableHandle]) -> bool:
    """Put hooks on the last layer, into `hooks` too, and say whether it serves with them; it may raise as well."""
    embedding: Any = model.get_input_embeddings()
    drawn = torch.randint(embedding.weight.shape[0], (2, 12), generator=torch.Generator().manual_seed(0))
    tokens, wanted = drawn.to(model.device), torch.zeros(2, 12, dtype=torch.bool, device=model.device)
    wanted[0, [4, 9]] = wanted[1, 7] = True
    expected = last_hidden(model, tokens)[wanted]

    def serves(whole: bool) -> Read | None:
        with _reading(Read(wanted, torch.nan, whole)) as read:
            same = alike(last_hidden(model, tokens)[wanted], expected, model)
        return read if same and read.attentions == 1 else None

    def spared(part: torch.nn.Module) -> bool:
        trial = _leave_out(part)
        found = holds(lambda: all((read := serves(whole)) and read.used for whole in (True, False)))
        _remove(trial)
        return found

    hooks += [layer.register_forward_pre_hook(_enter), layer.register_forward_hook(_leave)]
    after: list[torch.nn.Module] = []

    def note(part: torch.nn.Module, _: Any) -> None:
        if (read := _READ.get()) and read.attentions and not any(part in one.modules() for one in after):
            after.append(part)

    notes = [part.register_forward_pre_hook(note) for part in layer.modules() if part is not layer]
    attends = holds(lambda: serves(False) is not None)
    _remove(notes)
    for part in [part for part in after if spared(part)] if attends else []:
        hooks += _leave_out(part)
    return serves(False) is not None


def _last(model: PreTrainedModel) -> torch.nn.Module | None:
    """The last module of the outermost list of them, which is that of the layers; None where there is none."""
    named = ((name.count("."), part) for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList))
    lists = [(depth, part) for depth, part in named if len(part)]
    return min(lists, key=lambda one: one[0])[1][-1] if lists else None


def _leave_out(part: torch.nn.Module) -> list[RemovableHandle]:
    """From now on the part gets and gives the positions that are read alone, while some are."""
    return [part.register_forward_pre_hook(_narrow, with_kwargs=True), part.register_forward_hook(_widen)]


def _narrow(_: torch.nn.Module, args: Any, kwargs: Any) -> Any:
    read = _READ.get()
    return None if read is None else tree_map(read.narrow, (args, kwargs))


def _widen(_: torch.nn.Module, __: Any, output: Any) -> Any:
    read = _READ.get()
    return None if read is None else tree_map(read.widen, output)


def _enter(_: torch.nn.Module, __: Any) -> None:
    if read := _READ.get():
        read.within = True


def _leave(_: torch.nn.Module, __: Any, ___: Any) -> None:
    if read := _READ.get():
        read.within = False


def _remove(hooks: Iterable[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()
