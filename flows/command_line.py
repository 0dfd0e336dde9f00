"""`ippo`: the command line. Heavy libraries are imported inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from flows import abtest_commands, registry_commands
from flows.environment import check_prefect, mendable, server_apart
from flows.options import Params, Sets, as_parameters, configured
from iterative_ppo.config import DEFAULTS, Config
from iterative_ppo.errors import ConfigError, SourceError

app = typer.Typer(
    name="ippo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Turn logs of conversations into a policy that reaches outcomes, round after round, with evidence.\n\n"
    "Start with `ippo run`: rounds of Iterative PPO on a simulated renovation business, on built-in defaults.",
)
data_app = typer.Typer(no_args_is_help=True, help="Versioned datasets: list them, bring one back.")
app.add_typer(data_app, name="data")


@app.command()
def init(path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("params.yaml")) -> None:
    """Write a params.yaml to edit: every key, its default and what it means."""
    if path.exists():
        raise ConfigError(f"{path}: exists already; remove it or name another path")
    shutil.copyfile(DEFAULTS, path)
    typer.echo(f"wrote {path}; edit it, then run `ippo run --params {path}`")


@app.command()
def run(
    source: Annotated[
        str | None, typer.Option(help="renovation (simulated), environment, star, craigslist or table.")
    ] = None,
    path: Annotated[Path | None, typer.Option(help="File or folder of logs; of an environment, module:name.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Largest number of rounds.")] = None,
    params: Params = None,
    sets: Sets = None,
) -> None:
    """Rounds of Iterative PPO: with the simulator until converged or out of budget; one offline round on real logs."""
    config, file, overrides = configured(
        params, sets, source__kind=source, source__path=path, rounds__max_rounds=rounds
    )
    _ready(config)
    if config.source.simulated:
        from flows.simulation import simulated_rounds

        test = simulated_rounds(file, overrides)
        _show_status(config)
        if test:
            _show_closing(test)
    else:
        from flows.offline import offline_round

        offline_round(file, overrides)
        _show_status(config)
    _write_report(config)


def _ready(config: Config) -> None:
    """What would stop a run in its first second is said before a server starts."""
    from tasks.state import load_state, only_one

    if config.source.simulated:
        from tasks.tryout import try_out

        try_out(config)
    else:
        if config.source.path is None:
            raise ConfigError(f"source {config.source.kind!r} reads logs: name their file or folder with --path")
        if not config.source.path.exists():
            raise SourceError(f"{config.source.path}: no such file or folder")
    check_prefect()
    server_apart()
    with only_one(config.data.root):
        load_state(config.data.root)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="star, craigslist or table.")],
    path: Annotated[Path, typer.Argument(help="File or folder of logs.")],
    params: Params = None,
    sets: Sets = None,
) -> None:
    """Logs into the turn table's inbox; what is unusable goes to quarantine, each with its reason."""
    config, _, _ = configured(params, sets, source__kind=source, source__path=path)
    from iterative_ppo.learning.objective import success_above
    from iterative_ppo.report.words import count
    from tasks.traffic import import_logs

    file, log = import_logs(config)
    talks = log.conversations
    actions = [t for talk in talks for t in talk.turns if not t.terminal]
    weights, above = config.outcomes.values(), success_above(config)
    worth = [sum(w * o for w, o in zip(weights, talk.turns[-1].outcomes, strict=True)) for talk in talks]
    found = (count(len(talks), "conversations"), count(len(actions), "transitions"))
    typer.echo(f"{file or 'nothing new'}: {', '.join(found)}, {sum(r > above for r in worth):,} successful")
    for line in log.told():
        typer.echo(f"  {line}")


@app.command()
def suggest(
    conversation: Annotated[Path, typer.Argument(help="A JSON file, or - for standard input.")],
    alias: Annotated[str, typer.Option(help="champion, challenger or a version number.")] = "champion",
    unit: Annotated[
        str | None,
        typer.Option(help="Id of the conversation, or business: during an A/B test its hash decides who answers."),
    ] = None,
    began: Annotated[
        str | None,
        typer.Option(help="With --unit: when the conversation began (2026-03-02T09:30:00+01:00); without it, now."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    params: Params = None,
    sets: Sets = None,
) -> None:
    """The policy's suggestion for a conversation.

    The JSON: {"context": "...", "messages": [{"customer": "..."}, {"suggestion": "...", "business": "..."}, ...]};
    messages alternate and the last one is the customer's.
    """
    config, _, _ = configured(params, sets)
    from flows.suggesting import read_state, suggestion_for, time_of

    state = read_state(_text(conversation), str(conversation))
    started = time_of(began) if began else None
    suggested = json.dumps(suggestion_for(config, state, alias, seed, unit, started), ensure_ascii=False)
    typer.echo(suggested.encode())  # JSON is UTF-8, whatever the locale


def _text(path: Path) -> str:
    """A file, or standard input for `-`, as UTF-8, whatever the locale."""
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}, byte {error.start}: expected UTF-8 text; convert it to UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None


@app.command()
def status(params: Params = None, sets: Sets = None) -> None:
    """Where the pipeline stands: champion, phase, running test, rounds so far."""
    config, _, _ = configured(params, sets)
    _show_status(config)


@app.command()
def report(
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    params: Params = None,
    sets: Sets = None,
) -> None:
    """Write the run's report: one self-contained HTML file."""
    config, _, _ = configured(params, sets)
    _write_report(config, out)


abtest_commands.add_to(app)
registry_commands.add_to(app)


@data_app.command("list")
def data_list(params: Params = None, sets: Sets = None) -> None:
    """The versioned datasets, round by round."""
    config, _, _ = configured(params, sets)
    from tasks import versioning

    for entry in versioning.rounds(config):
        here = "here" if entry.present else "not here: `ippo data checkout`"
        typer.echo(f"round {entry.round_number}: {entry.md5}, {entry.size} bytes, {entry.files} files, {here}")


@data_app.command("checkout")
def data_checkout(
    round_number: Annotated[int, typer.Option("--round", help="Which round's dataset.")],
    params: Params = None,
    sets: Sets = None,
) -> None:
    """Bring a round's dataset back from the DVC remote."""
    config, _, _ = configured(params, sets)
    from flows.data import checkout

    typer.echo(f"round {round_number}: {checkout(config, round_number)}")


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help="initial-policy, collect, validate, returns, fit-q, improve or gate.")],
    params: Params = None,
    sets: Sets = None,
) -> None:
    """One offline stage on `data/repro`, as `dvc repro` runs it (see dvc.yaml)."""
    config, _, _ = configured(params, sets)
    from flows.repro import run_offline_stage

    run_offline_stage(config, name)


@app.command()
def deploy(
    params: Annotated[Path | None, typer.Option("--params", "-p", help="The nights' params.yaml.")] = None,
    sets: Sets = None,
) -> None:
    """Register the deployments of prefect.yaml on the server that PREFECT_API_URL names, with these parameters.

    Without --params, the nights have the file that prefect.yaml names, else the defaults.
    """
    from flows.deployment import deploy_all

    overrides, secrets = as_parameters(sets or [])
    if secrets:
        raise ConfigError(
            "--set: an address that is a secret, and Prefect shows a deployment's parameters; set "
            f"{', '.join(secrets)} in the environment of the worker instead"
        )
    check_prefect()
    deploy_all(params, overrides)


@app.command()
def doctor(params: Params = None, sets: Sets = None) -> None:
    """Check the installation and the store, and say what to do."""
    from flows.doctor import examine

    config, _, _ = configured(params, sets)
    if not examine(config):
        raise typer.Exit(1)


def _write_report(config: Config, out: Path = Path("report.html")) -> None:
    from flows.reporting import publish

    typer.echo(f"report: {publish(config, out)}")


def _show_status(config: Config) -> None:
    from flows.reporting import status_lines

    for line in status_lines(config):
        typer.echo(line)


def _show_closing(test: dict[str, Any]) -> None:
    from iterative_ppo.evaluation.ab_test import p_in_words

    first, last = test["champion"], test["challenger"]
    before, after = first["successes"] / first["conversations"], last["successes"] / last["conversations"]
    if test["first"] == test["last"]:
        served = f"{after:.1%} success with {last['conversations']} fresh customers"
        typer.echo(f"the first policy, version {test['last']}, serves as at the start: {served}")
        return
    interval = f"95% interval {test['gain_low']:+.1%} to {test['gain_high']:+.1%}"
    typer.echo(
        f"fresh customers, {last['conversations']} each: pi_0 {before:.1%}, champion {after:.1%}, "
        f"gain {test['gain']:+.1%} ({interval}), {p_in_words(test['p_value'])}"
    )


def _stop_at_signals() -> list[int]:
    """Signals end the process as an exit does, so that what it started, such as Prefect's temporary server, is stopped.

    Returns the signals that came; it fills as they do. One that is ignored, as by nohup, stays so.
    """
    came: list[int] = []

    def stop(number: int, _: object) -> None:
        came.append(number)
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)
    return came


def main() -> None:
    """Run the command line; an error that a user can mend is one line on standard error and its own exit code."""
    came = _stop_at_signals()
    try:
        app()
    except BaseException as error:
        if came:  # whatever else broke on the way out
            name = signal.Signals(came[0]).name
            typer.echo(f"ippo: stopped by {name}; what is finished is kept, start again to go on", err=True)
            sys.exit(128 + came[0])
        told = mendable(error) if isinstance(error, Exception) else None
        if told is None:
            raise
        typer.echo(f"ippo: {told}", err=True)
        sys.exit(told.exit_code)


if __name__ == "__main__":
    main()
