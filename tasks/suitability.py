"""Whether a configuration suits its model and corpus: a person is told of what does not, and nothing is refused."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from iterative_ppo.config import Config, PolicyConfig

if TYPE_CHECKING:
    from iterative_ppo.mdp.conversation import Conversation
    from iterative_ppo.mdp.rendering import Renderer

_LOG = logging.getLogger(__name__)
TINY_WEIGHTS = 20_000_000
HIGHEST_RATE = 3e-4
"""The highest learning rate that is usual for a pretrained model, of adapters; a tenth of it for all weights."""
TOLD_SHARE = 0.02
"""Of a corpus, above which a person is told that the policy's limits cut it."""


def tell_of_rates(config: Config, weights: int, trained: set[str]) -> None:
    """Tell of learning rates that are for tiny models, where the policy is none.

    Args:
        trained: sections of the configuration that hold the rates.
    """
    rates = _rates(config.model_dump(include=trained))
    high = [f"{name} = {rate:g}" for name, rate in rates if rate > HIGHEST_RATE]
    if weights > TINY_WEIGHTS and high:
        _LOG.warning(
            "the policy has %.0f million weights, and learning rates are those of tiny models, which would undo "
            "what it knows: %s; see configs/pretrained.yaml",
            weights / 1e6,
            ", ".join(high),
        )


def _rates(values: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _rates(value, f"{at}{name}.")
        elif name.endswith("learning_rate"):
            yield f"{at}{name}", float(value)


def cut_by_limits(
    corpus: Sequence[Conversation], forgotten: Sequence[int], renderer: Renderer, limits: PolicyConfig
) -> dict[str, float]:
    """Shares of the corpus: suggestions it could not say whole, conversations whose beginning it forgets.

    Args:
        forgotten: of each conversation, how many turns its prompts leave out.
    """
    actions = [turn.suggestion for talk in corpus for turn in talk.turns]
    said = [len(renderer.response(action)) for action in actions if action and action.status != "missing"]
    lengths = np.array(said, dtype=np.int64)
    if not len(lengths):
        return {}
    found = {
        "longer_suggestions": float((lengths > limits.max_response_tokens).mean()),
        "longer_conversations": float(np.mean([cut > 0 for cut in forgotten])),
    }
    if found["longer_suggestions"] > TOLD_SHARE:
        _LOG.warning(
            "%.0f %% of the corpus's %d suggestions are longer than policy.max_response_tokens = %d, so the policy "
            "will be cut short where it means to say the like; 99 %% of them have at most %d tokens: set it to that",
            100 * found["longer_suggestions"],
            len(lengths),
            limits.max_response_tokens,
            int(np.quantile(lengths, 0.99, method="higher")),
        )
    if found["longer_conversations"] > TOLD_SHARE:
        _LOG.warning(
            "%.0f %% of the corpus's %d conversations are longer than policy.max_prompt_tokens = %d, so the policy "
            "does not see how they began; raise it as far as memory, time and the model's context allow",
            100 * found["longer_conversations"],
            len(corpus),
            limits.max_prompt_tokens,
        )
    return found
