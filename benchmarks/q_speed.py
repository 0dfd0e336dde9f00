"""Speed of returns and of fitting with shared prefixes, and what a round and a fit hold in memory."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.q_cells import FITTED, Row, cell, row, sections
from benchmarks.results_file import at_least, averaged, figure
from iterative_ppo.config import load_config
from iterative_ppo.environments.renovation import Renovation, Script
from iterative_ppo.environments.rollout import collect
from iterative_ppo.mdp import turn_table
from iterative_ppo.mdp.conversation import Conversation
from iterative_ppo.mdp.rendering import single
from iterative_ppo.mdp.returns import discounted_returns
from iterative_ppo.mdp.turn_table import last_rows, to_frame

TURNS = 10_000_000
FITTED_TO, HELD_OUT, SAME_LOSS = 1500, 1000, 0.01
"""Conversations of the fits that prefix sharing is timed on, those that both are judged by, and nats tolerated."""
AS_LOW = 1.5
"""Passes of a sequence a conversation, for one of a row a turn."""
GAMMA, SMALL, LARGE = 0.95, 2000, 64_000
"""From SMALL to LARGE conversations memory should not grow; they are far apart, for peaks differ by chance."""
STEPS = 40
"""Of a fit of either: a shorter one seldom meets a batch of long conversations, which the peak is about."""


def returns_speed(turns: int = TURNS) -> dict[str, float]:
    """CPU time of returns and of one numpy copy of the rewards, in one thread, taken in turn, the best of each."""
    rng = np.random.default_rng(0)
    last = rng.random(turns) < 1 / 8
    last[-1] = True
    reward = rng.random(turns)
    seconds: list[tuple[float, float]] = []
    for _ in range(20):
        began = time.process_time()
        reward.copy()
        copied = time.process_time()
        discounted_returns(reward, last, GAMMA)
        seconds.append((copied - began, time.process_time() - copied))
    copy, took = np.min(seconds, axis=0)
    return {"copy_ms": 1000 * copy, "returns_ms": 1000 * took, "ratio": took / copy}


def sharing_speed(seed: int, conversations: int = FITTED_TO) -> dict[str, float]:
    """A log's turns a second of the same regression: a sequence a conversation, beside a row a turn.

    And the loss that each ends at on other conversations: on its own a row a turn ends lower by learning it by heart.
    `longer` has as many passes more as it takes to end where a row a turn does.
    """
    from iterative_ppo.learning.batching import EncodedTable
    from iterative_ppo.learning.q_model import QModel, QSettings
    from iterative_ppo.learning.regression import Regression, regress
    from iterative_ppo.learning.rounds import round_of
    from iterative_ppo.learning.tiny import build_policy

    config = load_config()
    talks = collect(Script(0.6), Renovation(), conversations, 1 + seed, "script")
    others = collect(Script(0.6), Renovation(), HELD_OUT, 101 + seed, "script")
    policy = build_policy(talks, config.policy, seed)
    data, held = (round_of(policy, to_frame(some, config.outcomes, 0.15), config) for some in (talks, others))
    spans = [(s.tokens, x) for s in data.encoded.sequences for x in s.spans if x.trains]
    rows = [single(x.row, tokens[: x.start], tokens[x.start : x.end], True) for tokens, x in spans]
    turns, found = len(rows), dict[str, float]()
    apart, batch_size = EncodedTable(rows, data.encoded.rows), config.q.batch_size
    for name, table, batch, passes in (
        ("shared", data.encoded, batch_size, 1.0),
        ("longer", data.encoded, batch_size, AS_LOW),
        ("apart", apart, batch_size * turns // conversations, 1.0),
    ):
        q = QModel.from_policy(policy, QSettings.of(config), seed)
        how = Regression(passes, config.q.learning_rate, batch, config.q.running_weight)
        began = time.process_time()
        regress(q, table, data.head_returns, how, seed)
        found[name] = turns / (time.process_time() - began)
        found[f"loss_{name}"] = _cross_entropy(q.evaluate(held.encoded).q, held.returns)
    for name in ("shared", "longer"):
        found[f"ratio_{name}"] = found[name] / found["apart"]
        found[f"lost_{name}"] = found[f"loss_{name}"] - found["loss_apart"]
    return found


def _cross_entropy(q: np.ndarray, returns: np.ndarray) -> float:
    """Of Q in every turn that has one."""
    seen, said = np.isfinite(q), np.clip(q, 1e-6, 1 - 1e-6)
    return float(-(returns * np.log(said) + (1 - returns) * np.log(1 - said))[seen].mean())


def encoding_memory(conversations: int) -> dict[str, float]:
    """Bytes a turn that a round holds in memory, its tokens in a file, and at most while they are written."""
    from iterative_ppo.learning.rounds import round_from
    from iterative_ppo.learning.tiny import build_policy

    config = load_config()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turns.parquet"
        policy = build_policy(_scripted(conversations, path), config.policy, 0)
        tracemalloc.start()
        data = round_from(policy, turn_table.blocks(path, config.outcomes), config, Path(folder) / "tokens")
        held, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return {"held": held / len(data.last), "peak_mib": most / 2**20}


def _scripted(conversations: int, path: Path) -> list[Conversation]:
    """Conversations of a scripted agent, also written to a Parquet file."""
    talks, outcomes = collect(Script(0.6), Renovation(), conversations, 1, "script"), load_config().outcomes
    turn_table.write(to_frame(talks, outcomes, 0.15), path, outcomes)
    return talks


def fit_memory(conversations: int) -> dict[str, float]:
    """MiB that a fit of Q from a Parquet file takes at most, of a process of its own that has read none yet."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "turns.parquet"
        _scripted(conversations, path)
        command = [sys.executable, "-W", "ignore", "-m", "benchmarks.q_speed", str(path)]
        said = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    found: dict[str, float] = json.loads(said.stdout.splitlines()[-1])
    return found


def fitted(path: Path) -> dict[str, float]:
    """Read, encode, fit as many steps of any size, evaluate; peaks of resident memory in MiB (Linux)."""
    from iterative_ppo.learning.policy_evaluation import fit_q
    from iterative_ppo.learning.rounds import round_from, round_of
    from iterative_ppo.learning.tiny import build_policy

    config = load_config()
    few = list(itertools.islice(turn_table.conversations(next(turn_table.blocks(path, config.outcomes, 4000))), 300))
    policy = build_policy(few, config.policy, 0)
    talks = sum(int(last_rows(block).sum()) for block in turn_table.blocks(path, config.outcomes))
    q = config.q
    passes = {"epochs": STEPS * q.batch_size / talks, "value_epochs": STEPS * q.value_batch_size / talks}
    small = config.model_copy(update={"q": q.model_copy(update=passes)})
    warmed = to_frame(few, config.outcomes, 0.15)
    fit_q(policy, round_of(policy, warmed, small), [], small)
    before = _peak_mib()
    data = round_from(policy, turn_table.blocks(path, config.outcomes), small, path.with_name("tokens"))
    fit_q(policy, data, [], small).evaluate(data.encoded)
    return {"before_mib": before, "peak_mib": _peak_mib(), "turns": float(len(data.last))}


def _peak_mib() -> float:
    """Of this program alone: getrusage would also tell of the process that it was started from."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return float(status["VmHWM"].split()[0]) / 1024


def speed(seeds: Sequence[int]) -> list[Row]:
    """Prefix sharing on several seeds; the rest is measured once, whatever their number."""
    known = sections(load_config(), *FITTED)
    returns = cell("speed", "returns", 0, [TURNS, GAMMA], returns_speed)
    memory = cell("speed", "memory", 0, [LARGE // 4, known], lambda: encoding_memory(LARGE // 4))
    small, large = (cell("speed", "fit-memory", n, [known, STEPS], lambda n=n: fit_memory(n)) for n in (SMALL, LARGE))
    grows = large["peak_mib"] / small["peak_mib"]
    a_turn = 2**20 * (large["peak_mib"] - small["peak_mib"]) / (large["turns"] - small["turns"])
    fast = returns["ratio"] <= 10
    return [
        figure("returns of 10 million turns, CPU time over one copy's", returns["ratio"], None, "<= 10", fast),
        figure("returns of 10 million turns, CPU milliseconds", returns["returns_ms"]),
        *sharing(seeds),
        figure("a turn of a round in memory, bytes", memory["held"]),
        figure(f"encoding {LARGE // 4:,} conversations, MiB at most", memory["peak_mib"]),
        figure(f"fit of {SMALL:,} conversations, MiB at most", small["peak_mib"]),
        figure(f"fit of {LARGE // SMALL} times as many, peak memory over that", grows, None, "<= 1.1", grows <= 1.1),
        figure("fit, bytes that the peak grows by a turn", a_turn),
    ]


def sharing(seeds: Sequence[int]) -> list[Row]:
    """How much faster prefix sharing makes a fit of Q, and whether it ends at the same loss."""
    known = [FITTED_TO, HELD_OUT, AS_LOW, sections(load_config(), *FITTED)]
    found = [cell("speed", "sharing", s, known, lambda s=s: sharing_speed(s)) for s in seeds]
    rows = [
        row("turns a second, a sequence a conversation", found, "shared"),
        row("turns a second, a row a turn", found, "apart"),
        row("held-out loss after a pass, a sequence a conversation", found, "loss_shared"),
        row("held-out loss after a pass, a row a turn", found, "loss_apart"),
    ]
    for kind, passes in (("shared", ""), ("longer", ", a pass and a half for one")):
        ratio, lost = ([f[f"{key}_{kind}"] for f in found] for key in ("ratio", "lost"))
        rows.append(averaged(f"prefix sharing, times as fast{passes}", ratio, seeds, ">= 2", at_least(2)))
        name = f"loss with prefix sharing less that without{passes}"
        rows.append(averaged(name, lost, seeds, f"<= {SAME_LOSS}", lambda mean, low: mean <= SAME_LOSS))
    return rows


if __name__ == "__main__":
    print(json.dumps(fitted(Path(sys.argv[1]))))
