"""`ippo` as a person meets it: help, one-line errors, exit codes, and nothing left behind by bad input."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from flows import command_line, environment
from flows.suggesting import read_state
from iterative_ppo.errors import SourceError, StoreError
from iterative_ppo.evaluation.ab_test import Arm, ab_test


def ippo(folder: Path, *arguments: str, stdin: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    command, environment = [sys.executable, "-m", "flows.command_line", *arguments], {**os.environ, **variables}
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        input=stdin,
        timeout=300,
        check=False,
        env=environment,
    )


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One line on standard error that holds all the words, and this exit code."""
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0]


def test_help_names_the_commands(tmp_path: Path) -> None:
    done = ippo(tmp_path, "--help")
    assert done.returncode == 0
    for command in ("run", "import", "suggest", "status", "report", "promote", "rollback", "data", "deploy", "doctor"):
        assert command in done.stdout


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    script = "import sys, flows.command_line; print([m for m in ('torch', 'mlflow', 'dvc') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "number",
    [signal.SIGINT, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGTERM, signal.SIGHUP))],
)
def test_a_stopped_run_takes_its_server_with_it(tmp_path: Path, number: signal.Signals) -> None:
    """Its whole process group hears the signal, as after Ctrl-C in a terminal."""
    command = [sys.executable, "-m", "flows.command_line", "run", "--set", "simulator.corpus_conversations=60"]
    heard: dict[str, Any] = {"start_new_session": True, "preexec_fn": partial(signal.signal, number, signal.SIG_DFL)}
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, **heard) as run:
        assert run.stderr
        lines = takewhile(lambda line: "fine-tuning" not in line, run.stderr)
        port = next(int(found[1]) for line in lines if (found := re.search(r"server on http://127.0.0.1:(\d+)", line)))
        assert all("Traceback" not in line for line in lines), "it has begun to train"
        assert reachable(port)
        os.killpg(run.pid, number)
        told = run.stderr.read()
    assert run.returncode == 128 + number, told
    (said,) = (line for line in told.splitlines() if line.startswith("ippo:"))
    assert f"stopped by {number.name}" in said and "Traceback" not in told
    assert not reachable(port)


@pytest.fixture
def signals() -> Iterator[None]:
    """Are what they were after `main` was called in this process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
def test_what_breaks_after_a_stop_is_not_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            raise ConnectionError("All connection attempts failed")

    monkeypatch.setattr(command_line, "app", app)
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 128 + signal.SIGTERM
    said = capsys.readouterr().err
    assert said == "ippo: stopped by SIGTERM; what is finished is kept, start again to go on\n"


def reachable(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_an_unknown_key_is_answered_with_the_nearest(tmp_path: Path) -> None:
    refused(ippo(tmp_path, "status", "--set", "improve.ppo.klip=1"), 2, "improve.ppo.klip", "did you mean 'clip'")


def test_a_wrong_type_names_the_key(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("gamma: soon\n", encoding="utf-8")
    refused(ippo(tmp_path, "run"), 2, "params.yaml", "gamma", "soon")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["params.yaml"]


def test_init_writes_params_once(tmp_path: Path) -> None:
    assert ippo(tmp_path, "init").returncode == 0
    written = (tmp_path / "params.yaml").read_text(encoding="utf-8")
    assert "kl_coefficient" in written
    refused(ippo(tmp_path, "init"), 2, "params.yaml", "exists")


def test_a_place_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    refused(ippo(tmp_path, "init", "file/params.yaml"), 8, "file/params.yaml", "Not a directory")


def test_a_missing_log_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    refused(ippo(tmp_path, "import", "star", "nowhere"), 3, "nowhere")
    assert not list((tmp_path / "data").rglob("*.parquet"))


def test_import_keeps_the_good_and_says_what_it_set_aside(tmp_path: Path) -> None:
    row = {"customer_id": "a", "customer_message": "hi", "suggestion": "hello", "business_message": "hello"}
    good = [
        {**row, "conversation_id": "good", "turn": 1, "outcome": 0.0},
        {**dict.fromkeys(row), "conversation_id": "good", "turn": 2, "customer_id": "a", "customer_message": "yes"},
    ]
    good[1]["outcome"] = 1.0
    bad = [{**row, "conversation_id": "bad", "turn": 1, "outcome": 7.0}]
    wild = [{**row, "conversation_id": f"wild{p}", "turn": 1, "outcome": 0.0, "behaviour_logprob": p} for p in (0.7, 2)]
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(r) + "\n" for r in [*good, *bad, *wild]), encoding="utf-8")
    refused(ippo(tmp_path, "import", "table", str(log)), 3, "'outcome' of 1 of 4", "is out of range: expected 0 to 1")
    done = ippo(tmp_path, "import", "table", str(log), "--set", "data.quarantine_share=0.5")
    assert done.returncode == 0, done.stderr
    assert "3 of 4 conversations (75.0%, data.quarantine_share allows 50.0%) are set aside" in done.stderr
    assert "1 conversation, 1 transition, 1 successful" in done.stdout
    assert "set aside: 1 outcome" in done.stdout
    assert "set aside: 2 behaviour_logprob: expected at most 0 (a natural logarithm)" in done.stdout
    aside = json.loads(next((tmp_path / "data" / "quarantine").glob("*.json")).read_text(encoding="utf-8"))
    assert aside[0]["conversation_id"] == "bad"
    assert "outcome" in aside[0]["reason"]
    assert "row 4, field 'behaviour_logprob': expected at most 0" in aside[1]["reason"]
    assert aside[1]["reason"].endswith("found 0.7")
    log.write_text("".join(json.dumps(r) + "\n" for r in wild), encoding="utf-8")
    refused(
        ippo(tmp_path, "import", "table", str(log)), 3, "no usable conversation", "row 1, field 'behaviour_logprob'"
    )
    calm = [{**r, "conversation_id": "calm", "outcome": 0.0} for r in good]
    calm[1]["customer_message"] = None
    log.write_text("".join(json.dumps(r) + "\n" for r in calm), encoding="utf-8")
    done = ippo(tmp_path, "import", "table", str(log), "--set", "outcomes={escalated: -1.0}")
    assert "1 conversation, 1 transition, 1 successful" in done.stdout, done.stderr


@pytest.mark.parametrize("name", ["chats #3.jsonl", "2025-01-31", "[old] chats.jsonl", "null"])
def test_a_path_is_taken_as_it_is_written(tmp_path: Path, name: str) -> None:
    """Not as the YAML that it would be, which leads to another place."""
    (tmp_path / "chats").mkdir()
    refused(ippo(tmp_path, "import", "table", name), 3, f"{name}: no such file")


def test_a_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "state.json").write_text('{"format": 99}', encoding="utf-8")
    refused(ippo(tmp_path, "status"), 8, "state.json", "format 99")


def test_nobody_suggests_before_there_is_a_champion(tmp_path: Path) -> None:
    talk = json.dumps({"messages": [{"customer": "hi"}]})
    refused(ippo(tmp_path, "suggest", "-", stdin=talk), 8, "champion")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[]", "messages"),
        ('{"messages": [{"customer": null}]}', "message 1"),
        ('{"messages": [{"customer": "hi"}, {"business": "hello"}]}', "last message"),
        ('{"messages": [{"customer": "a"}, {"business": "b", "suggestion": 3}, {"customer": "c"}]}', "suggestion"),
        ('{"messages": [{"customer": "a"}], "context": 5}', "context"),
        ('{"messages": [{"customer": "\\ud800 x"}]}', "message 1: customer: .* half a character"),
        ('{"messages": [{"customer": "a"}], "context": "\\udfff"}', "context: .* half a character"),
        ("[" * 100_000, "not valid JSON"),
        ('{"messages": [{"customer": "a"}], "contxt": "VIP"}', r"talk.json: unknown .*'contxt'.*mean 'context'"),
        ('{"messages": [{"customer": "a", "business": "b"}]}', "message 1: unknown .*'business'; expected customer"),
        (
            '{"messages": [{"customer": "a"}, {"sugestion": "s", "business": "b"}, {"customer": "c"}]}',
            "message 2: unknown .*'sugestion'.*mean 'suggestion'",
        ),
        (
            '{"messages": [{"customer": "a"}, {"business": "b", "customer": "c"}, {"customer": "d"}]}',
            "message 2: unknown .*'customer'; expected business, suggestion",
        ),
    ],
)
def test_a_conversation_that_is_none_says_where(text: str, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        read_state(text, "talk.json")


def test_a_conversation_in_json_becomes_a_state() -> None:
    text = json.dumps(
        {
            "context": "opening hours: 9 to 5",
            "messages": [
                {"customer": "hi"},
                {"business": "hello", "suggestion": "hello"},
                {"customer": "when do you open?"},
                {"business": "at nine"},
                {"customer": "fine"},
            ],
        }
    )
    state = read_state(text, "-")
    assert state.customer_message == "fine"
    assert state.context == "opening hours: 9 to 5"
    assert [turn.adoption for turn in state.history] == ["verbatim", None]
    assert [turn.suggestion.status for turn in state.history if turn.suggestion] == ["suggested", "missing"]


def test_a_seed_below_zero_is_a_wrong_option(tmp_path: Path) -> None:
    done = ippo(tmp_path, "suggest", "-", "--seed", "-1", stdin='{"messages": [{"customer": "hi"}]}')
    assert done.returncode == 2 and "--seed" in done.stderr


def test_a_run_that_cannot_start_says_so_at_once(tmp_path: Path) -> None:
    refused(ippo(tmp_path, "run", "--source", "star"), 2, "star", "--path")
    refused(ippo(tmp_path, "run", "--source", "star", "--path", "nowhere"), 3, "nowhere")


@pytest.mark.parametrize("command", ["run", "deploy"])
def test_a_prefect_server_that_is_down_is_one_line(tmp_path: Path, command: str) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{taken.getsockname()[1]}/api"
        done = ippo(tmp_path, command, PREFECT_API_URL=f"http://me:secret@{place}")
    refused(done, 8, "PREFECT_API_URL", place, "prefect server start", "unset")
    assert "secret" not in done.stderr


def test_a_prefect_server_that_never_answers_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setattr(environment, "REACH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"http://127.0.0.1:{mute.getsockname()[1]}/api"
        begun = time.monotonic()
        with temporary_settings({PREFECT_API_URL: url}), pytest.raises(StoreError, match="no Prefect server"):
            environment.check_prefect()
    assert time.monotonic() - begun < 5


def test_a_prefect_home_that_cannot_be_written_to_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    home = str(tmp_path / "file" / "home")
    refused(ippo(tmp_path, "run", PREFECT_HOME=home, PREFECT_API_URL=""), 8, home, "PREFECT_HOME")


def test_standard_input_is_utf_8_whatever_the_locale(tmp_path: Path) -> None:
    posix = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    talk = json.dumps({"messages": [{"customer": "schön"}, {"business": "schön"}]}, ensure_ascii=False)
    refused(ippo(tmp_path, "suggest", "-", stdin=talk, **posix), 3, "last message")
    refused(ippo(tmp_path, "suggest", "-", stdin="\udcff", **posix), 3, "-, byte 0", "UTF-8")


def wrapped() -> RuntimeError:
    """As a library does that wraps what the database said."""
    error = RuntimeError("Flow run failed")
    error.__cause__ = sqlite3.OperationalError("database or disk is full")
    return error


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device: data.root, tracking.uri"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded: data.root"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system: data.root"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "data/state.json"), "data/state.json: No space left"),
        (wrapped(), "database or disk is full: data.root"),
        (RuntimeError("Failed to reach API at http://there/api/"), "PREFECT_API_URL is http://there/api/, and no"),
        (
            RuntimeError("Timed out while attempting to connect to ephemeral Prefect API server. It exited."),
            "temporary server did not start",
        ),
    ],
)
def test_what_a_disk_or_a_server_did_is_one_line(
    error: Exception, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(command_line, "app", Mock(side_effect=error))
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 8
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_first_policy_that_serves_still_is_not_compared_with_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Two samples of it differ by chance alone."""
    test = ab_test(Arm(15, 200), Arm(9, 200), 0.05).as_dict()
    command_line._show_closing({**test, "first": 1, "last": 1})
    said = capsys.readouterr().out
    assert said == "the first policy, version 1, serves as at the start: 4.5% success with 200 fresh customers\n"
    command_line._show_closing({**test, "first": 1, "last": 2})
    said = capsys.readouterr().out
    assert "pi_0 7.5%, champion 4.5%, gain -3.0% (95% interval -8" in said


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(command_line, "app", Mock(side_effect=ConnectionResetError("by whom?")))
    with pytest.raises(ConnectionResetError):
        command_line.main()
