"""`ippo deploy` against a real Prefect server: what the nights are given is what the server keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_command_line import ippo, refused

PARAMETERS = {"params_file": None, "overrides": {}}


@pytest.fixture
def api(server: None, monkeypatch: pytest.MonkeyPatch) -> str:
    from prefect.settings import get_current_settings

    return str(get_current_settings().api.url)


def kept(name: str) -> dict[str, Any]:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        return client.read_deployment_by_name(name).parameters


def test_every_deployment_keeps_what_it_was_given(api: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("gamma: 0.5\n", encoding="utf-8")
    options = ("--params", "mine.yaml", "--set", "rounds.max_rounds=7", "--set", "outcomes={sold: 1.0}")
    done = ippo(tmp_path, "deploy", *options, PREFECT_API_URL=api)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("nightly-round/nightly", "simulated-rounds/simulated"):
        assert kept(name) == {
            "params_file": str(tmp_path / "mine.yaml"),
            "overrides": {"rounds.max_rounds": 7, "outcomes": {"sold": 1.0}},
        }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--params", "none.yaml"), ("none.yaml", "no such params file")),
        (("--set", "rounds.max_round=7"), ("rounds.max_round", "did you mean 'max_rounds'")),
        (("--set", "gamma"), ("override 'gamma'", "expected section.key=value")),
        (("--set", "tracking.uri=mysql://me:pass@there/x"), ("a secret", "set MLFLOW_TRACKING_URI in the environment")),
    ],
)
def test_what_no_night_could_read_is_refused(
    api: str, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(ippo(tmp_path, "deploy", *options, PREFECT_API_URL=api), 2, *words)


def test_a_home_without_the_flows_is_refused(api: str, tmp_path: Path) -> None:
    """A worker would find nothing to run there, night after night."""
    done = ippo(tmp_path, "deploy", PREFECT_API_URL=api, IPPO_HOME=str(tmp_path))
    refused(done, 2, f"IPPO_HOME {tmp_path}", "flows/night.py", "export IPPO_HOME=")
