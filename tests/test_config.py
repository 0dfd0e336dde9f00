"""One loader for every way in: defaults, a partial params file, overrides; and every mistake named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from iterative_ppo.config import DEFAULTS, Config, load_config
from iterative_ppo.errors import ConfigError
from iterative_ppo.learning.objective import outcome_range


def leaves(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """{"a.b": value} of a nested mapping; the outcomes' names are values, not keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and key != "outcomes"
        flat |= leaves(value, f"{at}{key}.") if nested else {f"{at}{key}": value}
    return flat


SECTIONS = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
PROFILES = SECTIONS.pop("profiles")
ALL = leaves(SECTIONS)
LOADED = ALL | leaves(PROFILES[ALL["source.kind"]])
"""Without a file of the user's: the defaults, and the profile of the default source over them."""


def params(folder: Path, text: str) -> Path:
    """A user's params file."""
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return folder / "mine.yaml"


# --- what loads ------------------------------------------------------------------------------------------------------


def test_the_defaults_load_and_are_all_of_params_yaml() -> None:
    assert leaves(load_config().model_dump(mode="json")) == LOADED
    assert set(LOADED) == set(ALL), "a profile names no key that has no default"


@pytest.mark.parametrize("kind", list(PROFILES))
def test_a_copy_of_the_defaults_changes_nothing(kind: str, tmp_path: Path) -> None:
    """What `ippo init` writes, as it stands: every source keeps its profile."""
    copy = params(tmp_path, DEFAULTS.read_text(encoding="utf-8"))
    source = {"source.kind": kind}
    assert load_config(copy, source) == load_config(None, source)
    assert leaves(load_config(None, source).model_dump(mode="json")) == ALL | leaves(PROFILES[kind]) | source


def test_each_layer_lies_over_the_one_before_with_its_profile(tmp_path: Path) -> None:
    star = {"source.kind": "star"}
    assert load_config(params(tmp_path, "policy: {tokenizer: word}"), star).policy.tokenizer == "word"
    both = params(tmp_path, "gamma: 0.8\nprofiles: {star: {gamma: 0.9}}")
    assert load_config(both, star).gamma == 0.9
    assert load_config(both).gamma == 0.8
    assert load_config(both, star | {"gamma": 0.7}).gamma == 0.7
    assert load_config(both, star | {"profiles.star.gamma": 0.6}).gamma == 0.6


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("profiles: {stars: {gamma: 0.9}}", "'profiles.stars' .did you mean 'star'"),
        ("profiles: {star: {gama: 0.9}}", "profile 'star': unknown key 'gama' .did you mean 'gamma'"),
        ("profiles: {star: 3}", "profiles.star is a section"),
        ("profiles: 3", "profiles is a section"),
    ],
)
def test_a_profile_of_no_source_or_key_is_refused(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(params(tmp_path, text))


def test_no_default_is_written_in_the_code() -> None:
    """params.yaml is the one home of defaults: every key is required there."""
    for key in ALL:
        values = yaml.safe_load(DEFAULTS.read_text(encoding="utf-8"))
        *sections, name = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        del section[name]
        with pytest.raises(ValidationError, match=name):
            Config.model_validate(values)


def test_a_partial_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    path = params(tmp_path, "seed: 7\nimprove:\n  ppo:\n    clip: 0.1\ndata:\n  root: elsewhere\n")
    changed = {"seed": 7, "improve.ppo.clip": 0.1, "data.root": "elsewhere"}
    assert leaves(load_config(path).model_dump(mode="json")) == LOADED | changed


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_a_file_without_keys_is_the_defaults(tmp_path: Path, text: str) -> None:
    assert load_config(params(tmp_path, text)) == load_config()


def test_the_outcomes_are_the_users_own(tmp_path: Path) -> None:
    path = params(tmp_path, "outcomes:\n  contact: 0.5\n  requirements: 1\n")
    assert load_config(path).outcomes == {"contact": 0.5, "requirements": 1.0}


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    path = params(tmp_path, "gamma: 0.8\nq:\n  epochs: 2\n")
    config = load_config(path, ["gamma=0.7"])
    assert (config.gamma, config.q.epochs, config.seed) == (0.7, 2.0, 0)
    assert load_config(path, ["gamma=0.7", "gamma=0.6"]).gamma == 0.6


@pytest.mark.parametrize(
    "overrides",
    [["q.epochs=3", "gate.min_support=1e-3", "data.remote="], {"q.epochs": 3, "gate.min_support": 1e-3}, []],
)
def test_overrides_are_strings_or_a_mapping(overrides: Any) -> None:
    config = load_config(None, overrides)
    assert (config.q.epochs, config.gate.min_support) == ((3.0, 0.001) if overrides else (ALL["q.epochs"], 0.9))
    assert config.data.remote is None


def test_override_values_are_yaml() -> None:
    config = load_config(
        None, ["q.warm_start=false", "outcomes={a: 1, b: -0.5}", "policy.abstain='='", "source.path=a=b"]
    )
    assert (config.q.warm_start, config.policy.abstain) == (False, "=")
    assert config.outcomes == {"a": 1.0, "b": -0.5} and config.source.path == Path("a=b")


def test_the_defaults_are_not_changed_by_what_is_laid_over_them() -> None:
    load_config(None, {"q.epochs": 99, "outcomes": {"x": 1.0}})
    assert leaves(load_config().model_dump(mode="json")) == LOADED


def test_a_config_is_frozen() -> None:
    config = load_config()
    with pytest.raises(ValidationError, match="frozen"):
        config.gamma = 0.5
    with pytest.raises(ValidationError, match="frozen"):
        config.improve.ppo.clip = 0.5


# --- what is refused -------------------------------------------------------------------------------------------------

UNKNOWN = [
    ("gama: 0.9", "gama", "gamma"),
    ("data:\n  rot: x", "data.rot", "root"),
    ("improve:\n  ppo:\n    clipp: 0.1", "improve.ppo.clipp", "clip"),
    ("abtests: {}", "abtests", "abtest"),
]


@pytest.mark.parametrize(("text", "key", "near"), UNKNOWN)
def test_an_unknown_key_is_named_with_its_nearest_neighbour(tmp_path: Path, text: str, key: str, near: str) -> None:
    with pytest.raises(ConfigError, match=rf"mine\.yaml: unknown key '{key}' \(did you mean '{near}'\?\)"):
        load_config(params(tmp_path, text))


def test_a_retired_key_of_a_copy_of_older_defaults_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(params(tmp_path, "simulator: {copying_share: 0.3, conversations: 7}"))
    assert config.simulator.conversations == 7
    (warning,) = caplog.messages
    assert "mine.yaml: simulator.copying_share has no meaning any more" in warning


def test_an_unknown_key_in_an_override_is_named() -> None:
    with pytest.raises(ConfigError, match=r"override 'q\.epoch': unknown key 'q\.epoch' \(did you mean 'epochs'\?\)"):
        load_config(None, ["q.epoch=1"])


WRONG = [
    ("gamma", "high"),
    ("gamma", "1"),
    ("gamma", "0"),
    ("gamma", ".nan"),
    ("seed", "1.5"),
    ("source.kind", "csv"),
    ("policy.layers", "0"),
    ("policy.base_model", "12"),
    ("improve.ppo.clip", "-0.1"),
    ("improve.ppo", "4"),
    ("data", "here"),
    ("data.evidence_share", "1.5"),
    ("outcomes", "purchase"),
    ("outcomes", "{}"),
    ("outcomes", "{purchase: 0, contact: 0.0}"),
    ("outcomes", "{purchase: much}"),
    ("outcomes", "{purchase: .nan}"),
    ("outcomes", "{purchase: .inf}"),
    ("q.epochs", ".inf"),
    ("rounds.converged_below", ".nan"),
    ("data.root", "2024-13-45"),
]
"""The last of these is what YAML takes for a date that does not exist."""


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_value_is_refused_by_key_in_file_and_override(tmp_path: Path, key: str, value: str) -> None:
    text = value
    for part in reversed(key.split(".")):
        text = f"{{{part}: {text}}}"
    with pytest.raises(ConfigError, match=r"mine\.yaml") as in_file:
        load_config(params(tmp_path, text))
    with pytest.raises(ConfigError) as overridden:
        load_config(None, [f"{key}={value}"])
    named = key.rsplit(".", maxsplit=1)[-1] if value != "2024-13-45" else "YAML"
    for error in (in_file, overridden):
        assert named in str(error.value)
        assert len(str(error.value)) < 300 + len(str(tmp_path)), "a line, not the whole configuration"


def test_an_error_names_whoever_set_the_key(tmp_path: Path) -> None:
    """The override where it did, the file where that did; `params.yaml` is not to blame for `--set`."""
    with pytest.raises(ConfigError, match=r"^override 'gamma': gamma: .*got 2"):
        load_config(params(tmp_path, "seed: 1\n"), ["gamma=2"])
    mine = params(tmp_path, "gamma: 0.5\nimprove: {ppo: {clip: -1}}\n")
    with pytest.raises(ConfigError, match=r"mine\.yaml: improve\.ppo\.clip: .*got -1"):
        load_config(mine, ["seed=3"])


def test_of_settings_at_odds_the_one_that_came_last_is_named(tmp_path: Path) -> None:
    """Not any later one that has nothing to do with it, nor one of the same section."""
    mine = params(tmp_path, "exploration: {share: 0.2}\n")
    with pytest.raises(ConfigError, match=r"^override 'q.target': exploration\.share 0\.2: q\.target td_lambda"):
        load_config(mine, ["q.target=td_lambda", "q.trace_decay=0.5"])
    with pytest.raises(ConfigError, match=r"mine\.yaml: exploration\.share 0\.2"):
        load_config(params(tmp_path, "exploration: {share: 0.2}\nq: {target: td_lambda}\n"), ["q.trace_decay=0.5"])
    with pytest.raises(ConfigError, match=r"^override 'improve\.best_of_n\.initial_share': improve\.best_of_n: "):
        load_config(None, ["improve.best_of_n.initial_share=0.05", "improve.best_of_n.epochs=2.0"])


AT_ODDS = [
    (
        {"runtime.processes": 9, "improve.algorithm": "grpo", "improve.ppo.minibatch_size": 8},
        "processes 9 are more than the 8 responses of improve.ppo.minibatch_size, which improve.algorithm grpo shares",
    ),
    (
        {"improve.logged.epochs": 0.0, "improve.best_of_n.epochs": 0.0, "improve.ppo.episodes": 0},
        "the challenger would be the champion once more; set one of them above 0",
    ),
    (
        {"improve.best_of_n.initial_share": 0.05},
        "initial_share 0.05 of 8 samples is none of them; set it to 0.12 or more, or to 0",
    ),
    ({"improve.ppo.judge_patience": 2}, "asks judges, but q.judges is 0; set it to 1 or more"),
]


@pytest.mark.parametrize(("values", "message"), AT_ODDS, ids=[message for _, message in AT_ODDS])
def test_settings_at_odds_are_refused_before_any_work(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, values)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"runtime\.accelerate: cannot be read as YAML \(.*No such file"),
        ("a: [", r"runtime\.accelerate: cannot be read as YAML \(while parsing"),
        ("- 1", r"runtime\.accelerate: .*mine\.yaml is no configuration of accelerate's"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}", r"the fsdp_version of .*mine\.yaml is not 2"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}", "grpo trains a whole model in each process"),
        ("distributed_type: MULTI_GPU", None),
    ],
)
def test_what_would_launch_processes_is_read_before_any_work(
    tmp_path: Path, text: str | None, message: str | None
) -> None:
    place = tmp_path / "mine.yaml"
    if text is not None:
        place.write_text(text, encoding="utf-8")
    values = {"runtime.processes": 2, "runtime.accelerate": str(place), "improve.algorithm": "grpo"}
    if message is None:
        assert load_config(None, values).runtime.accelerate == place
        return
    with pytest.raises(ConfigError, match=message):
        load_config(None, values)
    assert load_config(None, values | {"runtime.processes": 1}), "one process is not launched"


def test_a_file_may_merge_one_mapping_into_another(tmp_path: Path) -> None:
    a, b = "a: &a {instruction: Be short., temperature: 1.0}", "b: {<<: *a, temperature: 2.0}"
    path = params(tmp_path, f"exploration:\n  personas:\n    {a}\n    {b}\n")
    personas = load_config(path).exploration.personas
    assert (personas["b"].instruction, personas["b"].temperature) == ("Be short.", 2.0)


def test_the_range_of_outcomes_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="outcome_low must be below outcome_high") as error:
        load_config(params(tmp_path, "data:\n  outcome_low: 2\n"))
    assert "quarantine_share" not in str(error.value)
    for low, high in ((1, 5), (-3, -1)):
        with pytest.raises(ConfigError, match=f"outcome_low {low} to outcome_high {high} leaves out 0"):
            load_config(overrides={"data.outcome_low": low, "data.outcome_high": high})


def test_an_outcome_may_have_a_range_of_its_own() -> None:
    several: dict[str, Any] = {"outcomes": {"revenue": 1.0, "contact": 5.0}}
    config = load_config(overrides=several | {"data.outcome_ranges": {"revenue": [-50, 500]}})
    assert [config.data.range_of(name) for name in config.outcomes] == [(-50.0, 500.0), (0.0, 1.0)]
    assert outcome_range(config) == (-50.0, 505.0)
    for ranges, message in (
        ({"revenu": [0, 500]}, "no outcome is named 'revenu' .did you mean 'revenue'"),
        ({"revenue": [500, 0]}, "outcome_ranges.revenue: the least, 500, must be below the greatest, 0"),
        ({"revenue": [1, 500]}, "outcome_ranges.revenue 1 to 500 leaves out 0"),
        ({"revenue": [1]}, "outcome_ranges.revenue"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config(overrides=several | {"data.outcome_ranges": ranges})


BROKEN = [
    (b"gamma: [", "not valid YAML"),
    (b"a: b: c", "not valid YAML"),
    (b"\x00", "not valid YAML"),
    (b"gamma: .9\nseed: 1\ngamma: .8\n", r"not valid YAML: 'gamma' is given twice .*line 3"),
    (b"exploration:\n  personas:\n    a: {}\n    a: {}\n", r"not valid YAML: 'a' is given twice .*line 4"),
    (b"- 1\n- 2\n", "expected a mapping of sections, found list"),
    (b"gamma", "expected a mapping of sections, found str"),
    (b"\xff\xfe\xff", "cannot be read as UTF-8"),
    (b"data:\n", "data is a section, expected keys below it, got None"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_what_is_no_params_file_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"mine\.yaml: {message}") as error:
        load_config(tmp_path / "mine.yaml")
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mine\.yaml: no such params file; `ippo init` writes one"):
        load_config(tmp_path / "mine.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("override", ["gamma", "=1", "", "gamma=["])
def test_an_override_that_is_none_is_named(override: str) -> None:
    with pytest.raises(ConfigError, match=r"^override '") as error:
        load_config(None, [override])
    assert "\n" not in str(error.value), "the command line prints errors as one line"


def test_a_config_error_has_its_exit_code() -> None:
    assert ConfigError.exit_code == 2


def test_the_last_round_has_policy_iterations_of_its_own() -> None:
    config = load_config(None, {"rounds.max_rounds": 3, "rounds.last_policy_iterations": 3})
    assert [config.in_round(k).improve.policy_iterations for k in range(4)] == [1, 1, 3, 3]
    more = load_config(None, {"rounds.last_policy_iterations": 2, "improve.policy_iterations": 4})
    assert more.in_round(2) is more, "they are never fewer"
    usual = load_config()
    assert usual.in_round(2) is usual


def test_pi_0_says_its_share_in_the_first_rounds_alone() -> None:
    keys = {"improve.best_of_n.initial_share": 0.5, "improve.best_of_n.initial_rounds": 2}
    config, always = load_config(None, keys), load_config(None, {"improve.best_of_n.initial_share": 0.5})
    assert [config.in_round(k).improve.best_of_n.initial_share for k in range(4)] == [0.5, 0.5, 0.0, 0.0]
    assert always.in_round(9) is always
