"""What is told arrives at a real receiver; what cannot be told is a warning; an address is never shown."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from flows.options import ADDRESSES, configured
from iterative_ppo.config import Config, load_config
from tasks import notify

SECRET = "T0SECRET0/B0SECRET0/xxxxSECRETxxxxSECRETxxxx"


class Receiver(ThreadingHTTPServer):
    """Keeps what is posted; answers 500 below /broken."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[tuple[str, dict[str, object]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Receiver)
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, json.loads(body)))
        self.send_response(500 if self.path.startswith("/broken") else 200)
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.delenv(notify.ADDRESS, raising=False)
    with Receiver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def telling(url: str | None, kind: str = "webhook") -> Config:
    return load_config(overrides={"notify.url": url, "notify.kind": kind})


def test_a_webhook_gets_event_subject_and_body(receiver: Receiver) -> None:
    body = 'rejected: "{{x}}" über 5 %\nsecond line'
    assert notify.tell(telling(f"{receiver.url}/{SECRET}"), "verdict", "round 3: reject", body)
    said = {"event": "verdict", "subject": "iterative-ppo: round 3: reject", "body": body}
    assert receiver.got == [(f"/{SECRET}", said)]


def test_slack_gets_a_message(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slack's own address is the one thing that is not real here."""
    from apprise.plugins.slack import NotifySlack

    monkeypatch.setattr(NotifySlack, "webhook_url", f"{receiver.url}/services")
    config = telling(f"https://hooks.slack.com/services/{SECRET}", "slack")
    assert notify.tell(config, "alarm", "rollback", "outcome fell")
    ((path, said),) = receiver.got
    assert path == f"/services/{SECRET}"
    assert "rollback" in json.dumps(said) and "outcome fell" in json.dumps(said)
    receiver.shutdown()
    receiver.server_close()
    assert not notify.tell(config, "alarm", "rollback", "outcome fell"), "nobody listens any more"


def test_nobody_is_told_by_default(receiver: Receiver) -> None:
    assert not notify.tell(load_config(), "alarm", "a", "b")
    assert receiver.got == []


def test_the_environment_wins(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(notify.ADDRESS, f"{receiver.url}/environment")
    for config in (load_config(), telling(f"{receiver.url}/file")):
        assert notify.tell(config, "approval", "a", "b")
    assert [path for path, _ in receiver.got] == ["/environment"] * 2


@pytest.mark.parametrize(
    ("url", "kind", "fault"),
    [
        ("{receiver}/broken/SECRET", "webhook", "answer 500 at http://127.0.0.1/***"),
        ("http://user:SECRET@127.0.0.1:9/SECRET", "webhook", "ConnectError at http://127.0.0.1/***"),
        ("SECRET", "webhook", "expected http(s)://... at ***"),
        ("https://hooks.slack.com/services/SECRET", "slack", "NotificationError at https://hooks.slack.com/***"),
        ("https://chat.example.org/SECRET", "slack", "expected an incoming webhook at hooks.slack.com"),
    ],
)
def test_what_cannot_be_told_is_a_warning_without_the_address(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, url: str, kind: str, fault: str
) -> None:
    config = telling(url.format(receiver=receiver.url), kind)
    with caplog.at_level(logging.DEBUG):
        assert not notify.tell(config, "verdict", "round 0", "b")
    assert fault in caplog.text and "round 0" in caplog.text
    assert "SECRET" not in caplog.text


def test_a_delivery_is_logged_without_the_address(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        assert notify.tell(telling(f"{receiver.url}/{SECRET}"), "verdict", "round 0", "b")
    assert "SECRET" not in caplog.text


def test_an_address_on_the_command_line_does_not_become_a_flow_parameter(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(notify.ADDRESS, "", prepend=None)
    config, _, parameters = configured(None, [f"notify.url={receiver.url}/{SECRET}", "seed=3"])
    assert parameters == {"seed": 3} and config.seed == 3
    assert notify.tell(load_config(overrides=parameters), "verdict", "a", "b"), "the flow knows it all the same"


@pytest.mark.parametrize(
    "given",
    [
        "tracking.uri=postgresql+psycopg2://me:SECRET@127.0.0.1:9/x",
        'tracking={uri: "postgresql+psycopg2://127.0.0.1:9/x?password=SECRET"}',
        "data.remote=https://me:SECRET@127.0.0.1:9/x",
    ],
)
def test_an_address_with_a_password_does_not_become_a_flow_parameter(
    given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ADDRESSES.values():
        monkeypatch.setenv(variable, "", prepend=None)
    address = given.partition("=")[2].removeprefix('{uri: "').removesuffix('"}')
    assert configured(None, [given, "seed=3"])[2] == {"seed": 3}
    assert [os.environ[variable] for variable in ADDRESSES.values() if os.environ[variable]] == [address]
    configured(None, [given.replace("SECRET", "other")])
    assert address in os.environ.values(), "what the environment had stays"


def test_an_address_without_a_password_is_a_flow_parameter(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ADDRESSES.values():
        monkeypatch.setenv(variable, "", prepend=None)
    plain = {"tracking.uri": "sqlite:///a.db?timeout=5", "data.remote": "s3://bucket/turns", "data.root": "here"}
    given = [f"{key}={value}" for key, value in plain.items() if key != "data.root"]
    assert configured(None, [*given, "data={root: here}"])[2] == plain
    assert not any(os.environ[variable] for variable in ADDRESSES.values())


def test_an_address_in_the_configuration_is_masked_wherever_it_is_printed() -> None:
    config = telling(f"https://hooks.slack.com/services/{SECRET}", "slack")
    assert "SECRET" not in f"{config}{config!r}{config.model_dump()}{config.model_dump_json()}"
