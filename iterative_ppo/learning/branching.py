"""Sequences of which neighbours begin with the same prompt: it is read once, and each goes on from its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from iterative_ppo.learning.sampling import CachedReader, right_padded
from iterative_ppo.mdp.rendering import Encoded


@dataclass(frozen=True)
class Group:
    """Places `begin` to `end` - 1 of single-turn sequences that share a prompt; `longest` is of their responses."""

    prompt: tuple[int, ...]
    begin: int
    end: int
    longest: int

    @property
    def cost(self) -> int:
        """Padded tokens that are held for it at once."""
        return (self.end - self.begin) * (len(self.prompt) + self.longest)


def groups(sequences: Sequence[Encoded], tokens: int) -> list[Group]:
    """Neighbours with the same prompt, at most about `tokens` padded tokens a group."""
    found: list[Group] = []
    for k, sequence in enumerate(sequences):
        start = sequence.spans[0].start
        prompt, length = sequence.tokens[:start], len(sequence.tokens) - start
        last = found[-1] if found else None
        if last and last.prompt == prompt:
            grown = Group(prompt, last.begin, k + 1, max(last.longest, length))
            if grown.cost <= tokens:
                found[-1] = grown
                continue
        found.append(Group(prompt, k, k + 1, length))
    return found


def worthwhile(found: Sequence[Group]) -> bool:
    """Whether sharing spares a third of the tokens or more: reading in two steps costs something too."""
    spared = sum((group.end - group.begin - 1) * len(group.prompt) for group in found)
    return 3 * spared >= sum(group.cost for group in found) > 0


def batches(found: Sequence[Group], tokens: int) -> Iterator[list[Group]]:
    """All groups once, longest prompts first, at most about `tokens` padded tokens together."""
    batch: list[Group] = []
    rows = longest = 0
    for group in sorted(found, key=lambda group: -len(group.prompt)):
        rows, longest = rows + group.end - group.begin, max(longest, group.longest)
        if batch and rows * (len(batch[0].prompt) + longest) > tokens:
            yield batch
            batch, rows, longest = [], group.end - group.begin, group.longest
        batch.append(group)
    if batch:
        yield batch


@torch.inference_mode()
def branched_hidden(
    model: PreTrainedModel, batch: Sequence[Group], sequences: Sequence[Encoded], pad: int
) -> tuple[torch.Tensor, list[int], np.ndarray]:
    """Hidden states of a prompt's last token and of the response's, (R, 1 + L, H), padded on the right.

    Returns with them the R places of the sequences in their order, and (R,) tokens of each response.
    """
    places = [k for group in batch for k in range(group.begin, group.end)]
    responses = [sequences[k].tokens[sequences[k].spans[0].start :] for k in places]
    reader = CachedReader(model, [group.prompt for group in batch], pad)
    which = np.repeat(np.arange(len(batch)), [group.end - group.begin for group in batch])
    rows = torch.from_numpy(which).to(model.device)
    before = reader.last()[rows, None]
    reader.branch(rows, right_padded(responses, pad, model.device))
    return torch.cat([before, reader.hidden()], dim=1), places, np.array([len(response) for response in responses])
