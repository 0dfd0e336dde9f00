"""Q^pi and V^pi: a transformer with a head for each outcome and each member of an ensemble (Observation 2).

One network serves V and Q: the value read at the last token of a prompt is V(s), at the end of a response Q(s, a), and
at the tokens between a running value, E[Q | the response so far], which PPO uses as its token-level critic.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PreTrainedModel

from iterative_ppo.config import Config
from iterative_ppo.errors import ConfigError, StoreError, did_you_mean
from iterative_ppo.files import read_settings, write_json
from iterative_ppo.learning import branching, distributed, last_layer
from iterative_ppo.learning.batching import Batch, EncodedTable, inference_batches
from iterative_ppo.learning.checkpoint import load_weights, weights_of
from iterative_ppo.learning.forward import alike, backbone, holds
from iterative_ppo.learning.language_model import INFERENCE_TOKENS, LanguagePolicy
from iterative_ppo.learning.loading import tried, with_weights
from iterative_ppo.learning.objective import head_range, head_weights, own_ranges
from iterative_ppo.learning.sequences import Chosen
from iterative_ppo.learning.sharding import full
from iterative_ppo.learning.value_head import value_class
from iterative_ppo.learning.value_scale import ValueScale
from iterative_ppo.mdp.rendering import Encoded, single

_LOG = logging.getLogger(__name__)
SETTINGS = "q.json"
FORMAT = 3
"""Format 1 knew one head, 2 one range for all of them; what they wrote is read as such."""


@dataclass(frozen=True)
class QSettings:
    """How the network's outputs become values.

    Attributes:
        loss, low, high, bins: value_scale.ValueScale; the range is that of each named outcome,
            but of those that have one of their own in `ranges`.
        outcomes: weight of each named outcome in R, in the order of the heads.
        members: heads that improvement sees, each fitted to its own bootstrap. judges: further ones held back from it.
        pessimism: over members, Q is mean - pessimism * standard deviation, or their minimum ("min").
        value_head: V and the running value have heads of their own beside Q's.
    """

    loss: str
    low: float
    high: float
    gamma: float
    outcomes: Mapping[str, float] = field(default_factory=lambda: {"outcome": 1.0})
    members: int = 1
    judges: int = 0
    pessimism: float | str = 0.0
    value_head: bool = False
    bins: int = 1
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    format: int = FORMAT

    @classmethod
    def of(cls, config: Config) -> QSettings:
        c = config.q
        return cls(
            c.loss,
            *head_range(config),
            config.gamma,
            head_weights(config),
            c.members,
            c.judges,
            c.pessimism,
            c.target in ("lstd_q", "archer"),
            c.bins if c.loss == "hl_gauss" else 1,
            own_ranges(config),
        )

    @property
    def heads(self) -> int:
        """H, heads of Q: the outcomes of member 0, then those of member 1, ..., the judges last."""
        return (self.members + self.judges) * len(self.outcomes)

    @property
    def scale(self) -> ValueScale:
        low, high = zip(*self.outcome_ranges * (self.members + self.judges), strict=True)
        return ValueScale(self.loss, low, high, self.bins)

    @property
    def outcome_ranges(self) -> list[tuple[float, float]]:
        """(K, 2) least and greatest of each outcome."""
        return [self.ranges.get(name, (self.low, self.high)) for name in self.outcomes]

    def same_network(self, other: QSettings) -> bool:
        """Whether weights fitted under `other` are a start here: the same heads, whatever a single one is called."""

        def network(one: QSettings) -> QSettings:
            return replace(one, outcomes={}, pessimism=0.0, gamma=0.0, low=0.0, high=0.0, ranges={})

        names, others = list(self.outcomes), list(other.outcomes)
        same = network(self) == network(other) and self.outcome_ranges == other.outcome_ranges
        return same and (names == others or len(names) == len(others) == 1)


@dataclass(frozen=True)
class Values:
    """Per table row: V(s_i) where the row has a state to act in, Q(s_i, a_i) where it has a logged action, else NaN.

    Both (N,), or (N, H) with a column for each head.
    """

    v: np.ndarray
    q: np.ndarray

    @property
    def logged(self) -> Values:
        """With V, too, only where an action was logged: it is fitted there, and elsewhere means nothing."""
        return Values(np.where(np.isnan(self.q), np.nan, self.v), self.q)


class QModel:
    """Q^pi and V^pi, frozen once fitted.

    Attributes:
        report: figures of the fit it comes from, by name; empty for a loaded one.
    """

    def __init__(self, model: PreTrainedModel, settings: QSettings, pad: int) -> None:
        self.model, self.settings, self.pad = model, settings, pad
        self.report: dict[str, float] = {}
        model.eval()
        last_layer.prepare(model)

    @classmethod
    def from_policy(cls, source: LanguagePolicy | QModel, settings: QSettings, seed: int) -> QModel:
        """A new Q on the backbone of a policy (or of another Q), with fresh heads."""
        config = copy.deepcopy(source.model.config)
        config.num_labels = settings.heads * settings.bins * (1 + settings.value_head)
        config.dtype = torch.float32  # a policy whose weights are frozen may hold them in bfloat16; Q's are trained
        kind = value_class(config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model: Any = kind(config)
        backbone(model).load_state_dict(source.backbone_state())
        return cls(model.to(source.model.device), settings, source.pad)

    @classmethod
    def load(cls, path: Path, device: str = "cpu") -> QModel:
        """Load a saved Q. Raises StoreError or ModelError with the reason."""
        values = read_settings(path / SETTINGS, FORMAT)
        try:
            pad = values.pop("pad")
            ranges = {name: tuple(ends) for name, ends in values.get("ranges", {}).items()}
            settings = QSettings(**values | {"ranges": ranges, "format": FORMAT})
        except (KeyError, TypeError) as error:
            raise StoreError(f"{path / SETTINGS}: not a Q's settings ({error})") from None
        config = tried(lambda: AutoConfig.from_pretrained(str(path), trust_remote_code=False), path, "a saved Q-model")
        model = with_weights(value_class(config), str(path), path, torch.float32, "a saved Q-model")
        return cls(model.to(device), settings, pad)

    def save(self, path: Path) -> None:
        """Save weights (safetensors) and settings into a directory that `load` reads."""
        self.model.save_pretrained(path)
        write_json(path / SETTINGS, {**asdict(self.settings), "pad": self.pad})

    def copy(self) -> QModel:
        return QModel(copy.deepcopy(self.model), self.settings, self.pad)

    def training_state(self) -> dict[str, torch.Tensor]:
        """What training changes, by name, for a checkpoint."""
        return weights_of(dict(self.model.named_parameters()))

    def load_training_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take up what `training_state` of one of the same shape gave. Raises StoreError for another's."""
        load_weights(dict(self.model.named_parameters()), state)

    def backbone_state(self) -> dict[str, torch.Tensor]:
        """Weights of the network without its heads."""
        state: dict[str, torch.Tensor] = backbone(self.model).state_dict()
        return state

    def reweighted(self, outcomes: Mapping[str, float]) -> QModel:
        """The same network under new weights of its outcomes, its heads in their order, without a fit.

        Raises ConfigError for other names.
        """
        known = self.settings.outcomes
        if missing := [name for name in (*known, *outcomes) if name not in known or name not in outcomes]:
            hint = did_you_mean(missing[0], known)
            raise ConfigError(f"outcomes: this Q has heads for {', '.join(known)}, not for the weights given{hint}")
        reread, order = self.with_settings(outcomes=dict(outcomes)), [list(known).index(name) for name in outcomes]
        if order != sorted(order):
            reread.model = copy.deepcopy(self.model)
            reread._reorder_heads(order)
        return reread

    @torch.no_grad()
    def _reorder_heads(self, order: Sequence[int]) -> None:
        """Put the heads of each member into another order of the outcomes."""
        for parameter in self.head.parameters():
            blocks = parameter.unflatten(0, (-1, len(order), self.settings.bins))
            parameter.copy_(blocks[:, list(order)].flatten(0, 2))

    def with_settings(self, **changes: Any) -> QModel:
        """The same network read in another way: other `outcomes` weights or `pessimism`."""
        other = QModel(self.model, replace(self.settings, **changes), self.pad)
        other.report = self.report
        return other

    @torch.no_grad()
    def follow(self, other: QModel, share: float) -> None:
        """Move all weights by `share` of the way to another network's (a target network, Polyak averaging)."""
        for mine, theirs in zip(self.model.parameters(), other.model.parameters(), strict=True):
            mine.lerp_(full(theirs.detach()), share)

    # --- outputs -----------------------------------------------------------------------------------------------------

    @property
    def head(self) -> torch.nn.Linear:
        """The linear layer of all heads; transformers names it by family."""
        found = getattr(self.model, "score", None) or getattr(self.model, "classifier", None)
        assert isinstance(found, torch.nn.Linear), f"{type(self.model).__name__} has no linear head"
        return found

    def outputs_at(
        self, tokens: torch.Tensor, sequence: np.ndarray, position: np.ndarray, at_end: np.ndarray
    ) -> torch.Tensor:
        """(N, H, bins) outputs at (N,) positions of a batch (B, T)."""
        row, at, end = (torch.from_numpy(index).to(self.model.device) for index in (sequence, position, at_end))
        hidden = last_layer.hidden_at(self.model, tokens.to(self.model.device), row, at)
        return self.outputs(self._head_logits(hidden), end)

    def _head_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., C) raw head outputs, in float32 under autocast too."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden.to(self.head.weight.dtype)).float()

    def outputs(self, logits: torch.Tensor, at_end: torch.Tensor) -> torch.Tensor:
        """(N, H, bins) outputs of positions (N, C): of Q's heads at a response's end, elsewhere of V's."""
        blocks = logits.unflatten(-1, (-1, self.settings.heads, self.settings.bins))
        if not self.settings.value_head:
            return blocks[:, 0]
        return torch.where(at_end[:, None, None], blocks[:, 1], blocks[:, 0])

    def _values(self, batch: Batch, sequence: np.ndarray, position: np.ndarray, at_end: np.ndarray) -> np.ndarray:
        """(N, H) values at some positions of a batch."""
        outputs = self.outputs_at(batch.tokens, sequence, position, at_end)
        values: np.ndarray = self.settings.scale.value(outputs).cpu().numpy()
        return values

    # --- values ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def head_values(self, encoded: EncodedTable) -> Values:
        """(N, H) V and Q of all rows of a table by each head, one pass a sequence."""
        v, q = (np.full((encoded.rows, self.settings.heads), np.nan) for _ in range(2))
        mine = Chosen(encoded.sequences, np.array(distributed.share(range(len(encoded.sequences))), dtype=np.int64))
        for batch in inference_batches(mine, INFERENCE_TOKENS, self.pad):
            spans, logged = len(batch.row), np.flatnonzero(batch.trains)
            sequence = np.concatenate([batch.sequence, batch.sequence[logged]])
            position = np.concatenate([batch.start - 1, batch.end[logged] - 1])
            values = self._values(batch, sequence, position, np.arange(len(sequence)) >= spans)
            v[batch.row], q[batch.row[logged]] = values[:spans], values[spans:]
        return Values(distributed.filled(v), distributed.filled(q))

    def evaluate(self, encoded: EncodedTable) -> Values:
        """(N,) V and Q of all rows of a table: outcomes weighted, members combined as settings.pessimism says."""
        values = self.head_values(encoded)
        return Values(*(self._combined(self._by_member(x)) for x in (values.v, values.q)))

    def outcome_values(self, encoded: EncodedTable) -> Values:
        """(N, K) V and Q of all rows of a table by outcome, not weighted: means over the members improvement sees."""
        values, shape = self.head_values(encoded), (encoded.rows, -1, len(self.settings.outcomes))
        return Values(*(x.reshape(shape)[:, : self.settings.members].mean(axis=1) for x in (values.v, values.q)))

    def running_values(self, sequences: Sequence[Encoded]) -> list[np.ndarray]:
        """For each single-turn sequence: values at the last prompt token and at every response token, (1 + length,).

        A prompt that neighbours share is read once for all of them.
        """
        return [self._combined(self._by_member(values)) for values in self.running_heads(sequences)]

    def member_values(self, sequences: Sequence[Encoded]) -> list[np.ndarray]:
        """Like `running_values` by each member that improvement sees: (members, 1 + length)."""
        seen = self.settings.members
        return [self._by_member(values)[:, :seen].T for values in self.running_heads(sequences)]

    def judge_values(self, sequences: Sequence[Encoded]) -> list[np.ndarray]:
        """Like `running_values`, the mean of the judges. Raises ConfigError where it was fitted without any."""
        if not self.settings.judges:
            raise ConfigError("this Q has no judges; set q.judges to 1 or more and fit it again")
        seen = self.settings.members
        return [self._by_member(values)[:, seen:].mean(axis=-1) for values in self.running_heads(sequences)]

    @torch.inference_mode()
    def running_heads(self, sequences: Sequence[Encoded]) -> list[np.ndarray]:
        """Like `running_values` by each head: (1 + length, H)."""
        found = branching.groups(sequences, INFERENCE_TOKENS)
        if branching.worthwhile(found) and self._branches:
            return self._branched(sequences, found)
        of_row: dict[int, np.ndarray] = {}
        for batch in inference_batches(sequences, INFERENCE_TOKENS, self.pad):
            lengths = 1 + batch.end - batch.start
            stops = np.cumsum(lengths)
            position = np.arange(lengths.sum()) + np.repeat(batch.start - 1 - (stops - lengths), lengths)
            at_end = np.isin(np.arange(len(position)), stops - 1)
            values = self._values(batch, np.repeat(batch.sequence, lengths), position, at_end)
            of_row |= dict(zip(batch.row.tolist(), np.split(values, stops[:-1]), strict=True))
        return [of_row[sequence.spans[0].row] for sequence in sequences]

    @torch.inference_mode()
    def _branched(self, sequences: Sequence[Encoded], found: Sequence[branching.Group]) -> list[np.ndarray]:
        result: list[np.ndarray] = [np.empty(0)] * len(sequences)
        for batch in branching.batches(found, INFERENCE_TOKENS):
            hidden, places, lengths = branching.branched_hidden(self.model, batch, sequences, self.pad)
            at_end = torch.from_numpy(np.arange(hidden.shape[1]) == lengths[:, None]).to(hidden.device)
            outputs = self.outputs(self._head_logits(hidden).flatten(0, 1), at_end.flatten())
            values = self.settings.scale.value(outputs).unflatten(0, at_end.shape).cpu().numpy()
            for k, length, row in zip(places, lengths, values, strict=True):
                result[k] = row[: 1 + length]
        return result

    @cached_property
    def _branches(self) -> bool:
        """Whether its family goes on from a cached prompt as if it had read it anew: tried once, on short texts."""
        embedding: Any = self.model.get_input_embeddings()
        size = embedding.weight.shape[0]
        t = tuple(torch.randint(size, (24,), generator=torch.Generator().manual_seed(0)).tolist())
        spoken = [(t[:7], t[12:15]), (t[:7], t[15:20]), (t[7:12], t[20:22]), (t[7:12], t[22:])]
        sequences = [single(0, *pair, True) for pair in spoken]
        aim = [self.running_heads([sequence])[0] for sequence in sequences]

        def shared() -> bool:
            found = self._branched(sequences, branching.groups(sequences, INFERENCE_TOKENS))
            mine, theirs = (torch.from_numpy(np.concatenate(v)).to(self.model.device) for v in (found, aim))
            return alike(mine, theirs, self.model)

        if not (serves := holds(shared)):
            _LOG.warning("%s: Q reads the prompt anew for each response, which is slower", self.model.config.model_type)
        return serves

    def _by_member(self, values: np.ndarray) -> np.ndarray:
        """(N, H) values of the heads to (N, members + judges) weighted sums of outcomes."""
        weights = np.array(list(self.settings.outcomes.values()), dtype=values.dtype)
        summed: np.ndarray = values.reshape(len(values), -1, len(weights)) @ weights
        return summed

    def _combined(self, values: np.ndarray) -> np.ndarray:
        """(N, members + judges) to (N,): what improvement sees."""
        seen = values[:, : self.settings.members]
        if self.settings.pessimism == "min":
            return seen.min(axis=1)
        mean: np.ndarray = seen.mean(axis=1)
        return mean - float(self.settings.pessimism) * seen.std(axis=1, ddof=1) if self.settings.pessimism else mean
