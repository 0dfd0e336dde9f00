"""Q as a network, for language models: what estimators fit in the pipeline."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from iterative_ppo.config import QConfig
from iterative_ppo.learning.batching import Batch, EncodedTable, inference_batches
from iterative_ppo.learning.checkpoint import Checkpoint
from iterative_ppo.learning.estimators.protocol import Features, Learner, Schedule
from iterative_ppo.learning.forward import last_hidden
from iterative_ppo.learning.language_model import INFERENCE_TOKENS, LanguagePolicy
from iterative_ppo.learning.q_model import QModel, Values
from iterative_ppo.learning.regression import Regression, TargetNetwork, Targets, regress, take_up_fit
from iterative_ppo.learning.sequences import Joined, SequenceFile
from iterative_ppo.learning.training import Progress
from iterative_ppo.mdp.rendering import Encoded, single

SAMPLED_STATES = 1024
"""States whose sampled responses are laid out as token sequences at a time."""


@dataclass
class Log:
    """Encoded conversations of some rounds, and the policy whose Q is sought: what copies of a network share.

    Attributes:
        row_weights: (N, H) weight of each row for each head; None is 1.
        checkpoint: beside which each fit keeps what it needs to go on after a kill, and a finished one its weights.
        fits: how many were begun, which is the number of the next.
    """

    policy: LanguagePolicy
    tables: Sequence[EncodedTable]
    config: QConfig
    seed: int
    row_weights: np.ndarray | None = None
    progress: Progress | None = None
    checkpoint: Checkpoint | None = None
    fits: int = field(default=0, init=False)

    @cached_property
    def newest(self) -> int:
        """The last fit that was begun before a kill: those before it are finished. -1 where there was none."""
        return self.checkpoint.newest() if self.checkpoint else -1

    @property
    def outdone(self) -> bool:
        """Whether the next fit was finished before a kill, so that nobody needs its targets."""
        return self.fits < self.newest

    @cached_property
    def encoded(self) -> EncodedTable:
        return joined(self.tables)

    @cached_property
    def states(self) -> np.ndarray:
        """(S, 3) table row, sequence and end of the prompt of all states in which an action was logged."""
        spans = ((k, span) for k, sequence in enumerate(self.encoded.sequences) for span in sequence.spans)
        found = [(span.row, k, span.start) for k, span in spans if span.trains]
        return np.array(found, dtype=np.int64).reshape(-1, 3)

    def prompts(self, states: np.ndarray) -> list[tuple[int, ...]]:
        """Of some of `states`."""
        return [self.encoded.sequences[sequence].tokens[:end] for _, sequence, end in states.tolist()]

    @cached_property
    def responses(self) -> Sequence[Encoded]:
        """`samples` responses of the policy to each of `states`, drawn once."""
        drawn = (
            Encoded(tokens, ())
            for k, states in enumerate(self._states_by_block())
            for tokens in self.policy.respond(self.prompts(states), self.seed + k, samples=self.config.samples).tokens
        )
        place = self._place("responses")
        return list(drawn) if place is None else SequenceFile.write(place, drawn)

    def _states_by_block(self) -> Iterator[np.ndarray]:
        for begin in range(0, len(self.states), SAMPLED_STATES):
            yield self.states[begin : begin + SAMPLED_STATES]

    def sampled(self) -> Iterator[tuple[np.ndarray, EncodedTable]]:
        """Some states at a time: (their table rows, a sequence for each response to them)."""
        responses = iter(self.responses)
        for states in self._states_by_block():
            repeated = [prompt for prompt in self.prompts(states) for _ in range(self.config.samples)]
            said = [sequence.tokens for sequence in islice(responses, len(repeated))]
            sequences = [single(n, *pair, True) for n, pair in enumerate(zip(repeated, said, strict=True))]
            yield states[:, 0], EncodedTable(sequences, len(sequences))

    def mean_of_samples(
        self, of: Callable[[EncodedTable], np.ndarray], columns: int, into: np.ndarray | None = None
    ) -> np.ndarray:
        """(N, columns) mean of something over the policy's responses in each state, NaN (or as `into`) elsewhere."""
        result = np.full((self.encoded.rows, columns), np.nan) if into is None else into
        for rows, table in self.sampled():
            result[rows] = of(table).reshape(len(rows), self.config.samples, columns).mean(axis=1)
        return result

    def zeros(self, name: str, columns: int) -> np.ndarray:
        """(N, columns) float32, on disk where the tokens are."""
        shape, place = (self.encoded.rows, columns), self._place(name)
        if place is None:
            return np.zeros(shape, np.float32)
        return np.lib.format.open_memmap(place, "w+", np.float32, shape)

    def _place(self, name: str) -> Path | None:
        """A file of this process beside those of the tokens; None where they are in memory."""
        files = (table.sequences.path for table in self.tables if isinstance(table.sequences, SequenceFile))
        tokens = next(files, None)
        return tokens and tokens.with_name(f"{name}-{os.getpid()}")


class Network:
    """A QModel as the estimators see it. Fits change `q` in place.

    Each table is evaluated on its own, and a fit sees the sequences that have a target, in their order: adding a round
    that a fit does not use changes nothing in it. Where a fit goes on after a kill, those before it are not made again,
    nor their targets: values are then 0.
    """

    def __init__(self, q: QModel, log: Log) -> None:
        self.q, self.log = q, log
        self._kept: Checkpoint | None = None

    def copy(self) -> Network:
        return Network(self.q.copy(), self.log)

    def values(self) -> Values:
        if self.log.outdone:
            return Values(*np.zeros((2, self.log.encoded.rows, self.q.settings.heads)))
        found = [self.q.head_values(table) for table in self.log.tables]
        return Values(np.concatenate([f.v for f in found]), np.concatenate([f.q for f in found])).logged

    def expected(self) -> np.ndarray:
        if self.log.outdone:
            return np.zeros((self.log.encoded.rows, self.q.settings.heads))

        def at_ends(table: EncodedTable) -> np.ndarray:
            return np.stack([values[-1] for values in self.q.running_heads(table.sequences)])

        return self.log.mean_of_samples(at_ends, self.q.settings.heads)

    def fit(
        self,
        q: np.ndarray,
        v: np.ndarray | None = None,
        schedule: Schedule = "q",
        share: float = 1.0,
        target: Learner | None = None,
        expectile: float | None = None,
    ) -> None:
        log, number, outdone, slow = self.log, self.log.fits, self.log.outdone, None
        log.fits += 1
        if target is not None:
            assert isinstance(target, Network)
            slow = TargetNetwork(target.q, log.config.polyak)
        kept = log.checkpoint and log.checkpoint.beside(f"{number}")
        if outdone and kept:
            take_up_fit(self.q, slow, kept)
        else:
            how = regression(log.config, schedule)
            how = replace(how, epochs=how.epochs * share)
            targets = Targets.of(q, self.q.settings.heads, v, log.row_weights, expectile)
            loss = regress(self.q, log.encoded, targets, how, log.seed + number, log.progress, slow, kept)
            self.q.report["fit_loss"] = loss
        if self._kept:
            self._kept.clear()  # a later fit of the same network makes up for it
        self._kept = kept

    def weights(self) -> np.ndarray:
        given = self.log.row_weights
        return np.ones((self.log.encoded.rows, self.q.settings.heads)) if given is None else given

    # --- as a linear function of its backbone's last hidden state ----------------------------------------------------

    def features(self) -> Features:
        width = self.q.head.in_features + 1
        logged, expected = self.log.zeros("logged", width), self.log.zeros("expected", width)
        for batch, hidden in self._hidden(self.log.encoded):
            spans = np.flatnonzero(batch.trains)
            logged[batch.row[spans]] = hidden[batch.sequence[spans], batch.end[spans] - 1]
        return Features(logged, self.log.mean_of_samples(self._at_ends, width, expected))

    def solve(self, weights: np.ndarray) -> None:
        """Q's heads take `weights`; V's are fitted by ridge regression to E_pi Q at prompts' ends, to Q between."""
        q_weights = torch.from_numpy(weights.astype(np.float32))
        heads, scale = self.q.settings.heads, self.q.settings.scale
        v = np.nan_to_num(self.log.mean_of_samples(lambda table: self._at_ends(table) @ weights, heads))
        with torch.no_grad():
            for block, solved in ((1, q_weights), (0, torch.from_numpy(self._value_weights(weights, v)))):
                part = slice(block * heads, (block + 1) * heads)
                low, span = solved.new_tensor(scale.low), solved.new_tensor(scale.span)
                self.q.head.weight[part] = solved[:-1].T / span[:, None]
                self.q.head.bias[part] = (solved[-1] - low) / span

    def _value_weights(self, weights: np.ndarray, v: np.ndarray) -> np.ndarray:
        moments = self.log.config.ridge * np.eye(len(weights))
        products = np.zeros(weights.shape)
        for batch, hidden in self._hidden(self.log.encoded):
            for span in np.flatnonzero(batch.trains):
                row = batch.row[span]
                x = hidden[batch.sequence[span], batch.start[span] - 1 : batch.end[span]].astype(float)
                between = self.log.config.running_weight / max(1, len(x) - 2)
                weight = np.array([1.0] + [between] * (len(x) - 2))
                target = np.stack([v[row]] + [x[-1] @ weights] * (len(x) - 2))
                moments += (x[:-1] * weight[:, None]).T @ x[:-1]
                products += (x[:-1] * weight[:, None]).T @ target
        solved: np.ndarray = np.linalg.solve(moments, products).astype(np.float32)
        return solved

    def _at_ends(self, table: EncodedTable) -> np.ndarray:
        """(rows, F) features of the responses of single-turn sequences."""
        found = np.zeros((table.rows, self.q.head.in_features + 1), np.float32)
        for batch, hidden in self._hidden(table):
            found[batch.row] = hidden[batch.sequence, batch.end - 1]
        return found

    @torch.inference_mode()
    def _hidden(self, table: EncodedTable) -> Iterator[tuple[Batch, np.ndarray]]:
        """Batches with (B, T, F) features of each token: the last hidden state, and 1."""
        for batch in inference_batches(table.sequences, INFERENCE_TOKENS, self.q.pad):
            hidden = last_hidden(self.q.model, batch.tokens.to(self.q.model.device)).float()
            yield batch, torch.cat([hidden, torch.ones_like(hidden[..., :1])], dim=-1).cpu().numpy()


def regression(config: QConfig, schedule: Schedule) -> Regression:
    """The passes of a Monte Carlo V or of Q."""
    if schedule == "value":
        return Regression(
            config.value_epochs, config.value_learning_rate, config.value_batch_size, config.running_weight
        )
    return Regression(config.epochs, config.learning_rate, config.batch_size, config.running_weight)


def joined(tables: Sequence[EncodedTable]) -> EncodedTable:
    """Several encoded tables as one, rows renumbered."""
    if len(tables) == 1:
        return tables[0]
    rows = [table.rows for table in tables]
    sequences = Joined([table.sequences for table in tables], rows)
    return EncodedTable(sequences, sum(rows), sum(t.truncated_turns for t in tables), sum(t.unshared for t in tables))
