"""A job done by several processes: `accelerate launch -m iterative_ppo.learning.worker FOLDER` in each.

The folder holds the pickled job. All processes do it together (distributed.py), the first writes the result and tells
on its standard output how far it is.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from iterative_ppo import errors
from iterative_ppo.config import RuntimeConfig
from iterative_ppo.errors import IterativePPOError, WorkerLost
from iterative_ppo.files import read_json, write_json
from iterative_ppo.learning import distributed
from iterative_ppo.learning.jobs import Job, Result
from iterative_ppo.learning.runtime import computing
from iterative_ppo.learning.training import Progress

JOB, RESULT, ERROR = "job.pickle", "result", "error.json"
_STEP = "step"
_SOURCE = re.compile(r"(\[rank\d+\]: )?\s")
"""How a line of code begins that a traceback quotes."""


def do(job: Job[Result], folder: Path, progress: Progress | None = None) -> Result:
    """Do a job in as many processes as `runtime.processes` says, and leave its result in `folder`.

    Raises what the job raises, in whichever process, and WorkerLost where a process dies.
    """
    if job.config.runtime.processes == 1:
        result = job.run(progress)
        job.save(result, folder)
        return result
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what this process used for its own passes
    with tempfile.TemporaryDirectory(dir=folder, prefix=".job-") as name:
        scratch = Path(name)
        (scratch / JOB).write_bytes(pickle.dumps(job))
        (scratch / RESULT).mkdir()
        _launch(job.config.runtime, scratch, progress)
        for part in (scratch / RESULT).iterdir():
            part.rename(folder / part.name)
    return job.load(folder)


def _launch(config: RuntimeConfig, scratch: Path, progress: Progress | None) -> None:
    with (scratch / "stderr").open("w+") as said:
        process = subprocess.Popen(
            _command(config, scratch), stdout=subprocess.PIPE, stderr=said, text=True, env=_environment(config)
        )
        assert process.stdout is not None
        try:
            for line in process.stdout:
                match line.split():
                    case [word, done, total] if word == _STEP and progress:
                        progress(int(done), int(total))
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
        if code:
            said.seek(0)
            raise _error(scratch, code, said.read())


def _command(config: RuntimeConfig, scratch: Path) -> list[str]:
    module = ["-m", "iterative_ppo.learning.worker", str(scratch)]
    if config.accelerate:
        how = ["--config_file", str(config.accelerate)]
    else:
        how = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    how += ["--num_processes", str(config.processes), "--main_process_port", "0"]
    return [sys.executable, *BOUND, sys.executable, "-m", "accelerate.commands.launch", *how, *module]


DIE_WITH_PARENT = "import ctypes, sys; sys.platform == 'linux' and ctypes.CDLL(None).prctl(1, 9)"
"""PR_SET_PDEATHSIG, SIGKILL: a run that was killed leaves nobody that trains on beside the next one."""
BOUND = ("-c", f"{DIE_WITH_PARENT}; import os; os.execv(sys.argv[1], sys.argv[1:])")


def _environment(config: RuntimeConfig) -> dict[str, str]:
    """Threads as configured, for the launcher would set its own; and CPUs work together too."""
    threads = {"OMP_NUM_THREADS": str(config.threads)}
    return {**os.environ, **threads, "ACCELERATE_USE_CPU": str(config.device == "cpu").lower()}


def _error(scratch: Path, code: int, said: str) -> IterativePPOError:
    for path in sorted(scratch.glob(f"*.{ERROR}")):
        told = read_json(path)
        kind: type[IterativePPOError] = getattr(errors, told["kind"])
        return kind(told["message"])
    errors_said = [line for line in said.splitlines() if "Error" in line and not _SOURCE.match(line)]
    of_others = ("onnection", "ChildFailed")  # what the other processes say of it
    telling = [line for line in errors_said if not any(word in line for word in of_others)] or errors_said
    reason = telling[0][:300] if telling else "it said no more; is there memory enough?"
    return WorkerLost(f"a training process ended with exit code {code}: {reason}")


def work(scratch: Path) -> None:
    """What each process does."""
    exec(DIE_WITH_PARENT)
    from accelerate import PartialState

    PartialState(cpu=os.environ.get("ACCELERATE_USE_CPU") == "true")
    first = distributed.rank() == 0
    job: Any = pickle.loads((scratch / JOB).read_bytes())
    try:
        with computing(job.config.runtime):
            result = job.run(_tell if first else None)
            if first:
                job.save(result, scratch / RESULT)
    except IterativePPOError as error:
        told = {"kind": type(error).__name__, "message": str(error)}
        write_json(scratch / f"{distributed.rank()}.{ERROR}", told)
        sys.exit(error.exit_code)
    distributed.wait()


def _tell(done: int, total: int) -> None:
    print(_STEP, done, total, flush=True)


if __name__ == "__main__":
    work(Path(sys.argv[1]))
