"""Files are written whole or not at all, through errors and through kill -9, and their fingerprints tell them apart."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iterative_ppo.errors import StoreError
from iterative_ppo.files import content_hash, fingerprint, read_json, whole_directory, write_bytes, write_json

OLD, NEW = b"old " * 1000, b"new " * 5000

# --- kill -9 ---------------------------------------------------------------------------------------------------------

KILLER = '''
import json, os, signal, sys
from itertools import count
from pathlib import Path
from iterative_ppo import files

OLD, NEW = b"old " * 1000, b"new " * 5000

def seen(path):
    if path.is_dir():
        return {p.name: p.read_bytes()[:3].decode() for p in sorted(path.iterdir())}
    return path.read_bytes()[:3].decode() if path.exists() else None

def write_file(path, content):
    files.write_bytes(path, content)

def write_folder(path, content):
    with files.whole_directory(path) as draft:
        (draft / "a").write_bytes(content)
        (draft / "b").write_bytes(content)

def killed_at(line, job, path):
    """Run the job in a child that is killed when files.py reaches its `line`-th line. Returns whether it was killed."""
    child = os.fork()
    if not child:
        left = [line]
        def trace(frame, event, _):
            if frame.f_code.co_filename != files.__file__:
                return None
            if event == "line":
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
        job(path, NEW)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])

job = {"file": write_file, "folder": write_folder}[sys.argv[1]]
found = []
for line in count(1):
    path = Path(sys.argv[2]) / str(line) / "target"
    if sys.argv[3] == "old":
        job(path, OLD)
    killed = killed_at(line, job, path)
    found.append(seen(path))
    if not killed:
        break
print(json.dumps(found))
'''


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux forks and swaps folders in one step")
@pytest.mark.parametrize("before", ["old", "nothing"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_killed_at_any_line_the_old_content_or_the_new_stands_there(tmp_path: Path, kind: str, before: str) -> None:
    """One child process for each executed line of files.py, killed there."""
    command = [sys.executable, "-c", KILLER, kind, str(tmp_path), before]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = json.loads(done.stdout)
    whole = {"file": lambda content: content, "folder": lambda content: {"a": content, "b": content}}[kind]
    old, new = whole("old") if before == "old" else None, whole("new")
    assert len(found) > 5 and found[0] == old and found[-1] == new
    assert [content for content in found if content not in (old, new)] == []
    switch = found.index(new)
    assert found == [old] * switch + [new] * (len(found) - switch), "once new, it stays so"


def test_killed_within_the_block_the_folder_is_the_old_one(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "round") as draft:
        (draft / "a").write_bytes(OLD)
    script = (
        "import os, signal, sys; from pathlib import Path; from iterative_ppo.files import whole_directory\n"
        "with whole_directory(Path(sys.argv[1])) as draft:\n"
        "    (draft / 'a').write_text('half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "round")], timeout=60, check=False)
    assert done.returncode == -9
    assert [p.name for p in (tmp_path / "round").iterdir()] == ["a"]
    assert (tmp_path / "round" / "a").read_bytes() == OLD
    with whole_directory(tmp_path / "round") as draft:
        (draft / "a").write_bytes(NEW)
    assert (tmp_path / "round" / "a").read_bytes() == NEW, "what the kill left there is in nobody's way"


# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "down" / "a.bin"
    for content in (OLD, NEW, b""):
        write_bytes(path, content)
        assert path.read_bytes() == content
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes(tmp_path / "a", OLD)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(tmp_path / "a", NEW)
    assert (tmp_path / "a").read_bytes() == OLD and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("before", [True, False], ids=["over an old one", "anew"])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, failure: type[BaseException], before: bool) -> None:
    path = tmp_path / "round"
    if before:
        with whole_directory(path) as draft:
            (draft / "a").write_bytes(OLD)

    def half_done() -> None:
        with whole_directory(path) as draft:
            (draft / "a").write_bytes(NEW)
            raise failure

    with pytest.raises(failure):
        half_done()
    assert [p.name for p in tmp_path.iterdir()] == (["round"] if before else [])
    assert not before or (path / "a").read_bytes() == OLD


def test_a_folder_is_replaced_whole_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "round"
    for name in ("first", "second"):
        with whole_directory(path) as draft:
            assert not list(draft.iterdir()) and draft.parent == path.parent
            (draft / name).write_text(name)
            (draft / "sub").mkdir()
        assert sorted(p.name for p in path.iterdir()) == [name, "sub"]
        assert [p.name for p in path.parent.iterdir()] == ["round"]


def test_an_interrupt_between_the_renames_does_not_lose_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rename fails, the folder that was there is there."""
    path = tmp_path / "round"
    with whole_directory(path) as draft:
        (draft / "a").write_bytes(OLD)
    genuine = Path.replace

    def fails_on_drafts(self: Path, target: Path) -> Path:
        if Path(target) == path and self.parent == tmp_path:
            raise KeyboardInterrupt
        return genuine(self, target)

    monkeypatch.setattr(Path, "replace", fails_on_drafts)
    try:
        with whole_directory(path) as draft:
            (draft / "a").write_bytes(NEW)
    except KeyboardInterrupt:
        assert (path / "a").read_bytes() == OLD
    else:
        assert (path / "a").read_bytes() == NEW


# --- JSON ------------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_fingerprints_do_not_depend_on_the_order_of_keys(value: object) -> None:
    assert fingerprint({"a": value, "b": 1}) == fingerprint({"b": 1, "a": value})
    assert fingerprint(value) == fingerprint(value) != fingerprint([value])
    assert len(fingerprint(value)) == 16


def test_fingerprints_differ_with_the_values() -> None:
    values = [(), (None,), (0,), (1,), (1.5,), ("1",), (1, 2), ([1, 2],), ({},), ({"a": 1},), ({"a": 2},), (True,)]
    assert len({fingerprint(*value) for value in values}) == len(values)


def test_json_round_trip_and_refusal_of_nan(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    value = {"name": "Straße 🏠", "rounds": [1, 2.5, None, True], "": {}}
    write_json(path, value)
    assert read_json(path) == value
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"q": float("nan")})
    assert read_json(path) == value and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1}}', b"\xff\xfe", b"nope"])
def test_damaged_json_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(StoreError, match=r"a\.json: not valid JSON"):
        read_json(tmp_path / "a.json")


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"a\.json: not found"):
        read_json(tmp_path / "a.json")


# --- content hash ----------------------------------------------------------------------------------------------------


def tree(folder: Path, files: dict[str, str]) -> Path:
    """A folder with these files, written in this order."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


TREES: list[dict[str, str]] = [
    {"a": "1", "b": "2"},
    {"a": "1", "b": "3"},
    {"a": "2", "b": "1"},
    {"a": "1", "c": "2"},
    {"a": "1"},
    {"a": "1", "b": ""},
    {"a": "1", "sub/b": "2"},
    {"a": "bc"},
    {"ab": "c"},
    {"a": "1b2"},
    {"a": "", "b": ""},
    {"ab": ""},
]


def test_a_content_hash_changes_with_content_and_names(tmp_path: Path) -> None:
    """Also where the concatenation of names and contents does not: {a: bc} is not {ab: c}."""
    found = {content_hash(tree(tmp_path / str(n), files)): files for n, files in enumerate(TREES)}
    assert len(found) == len(TREES)


def test_a_content_hash_depends_on_nothing_else(tmp_path: Path) -> None:
    one, two = tree(tmp_path / "one", {"a": "1", "b": "2"}), tree(tmp_path / "two", {"b": "2", "a": "1"})
    (two / "a").touch()
    assert content_hash(one) == content_hash(two)
    more = tree(tmp_path / "more", {"a": "1", "b": "2", "record": "x", "other": "y"})
    assert content_hash(more, "record", "other") == content_hash(one) != content_hash(more, "record")
    assert content_hash(tree(tmp_path, {"x": "same"}) / "x") == content_hash(tree(tmp_path, {"y": "same"}) / "y")
    write_bytes(tmp_path / "big", bytes(3 << 20))
    assert content_hash(tmp_path / "big") != content_hash(tree(tmp_path, {"y": "same"}) / "y")


def test_the_content_hash_of_nothing_is_an_error(tmp_path: Path) -> None:
    """Not the hash of no bytes, which any two missing paths would share."""
    with pytest.raises(StoreError, match="nowhere"):
        content_hash(tmp_path / "nowhere")
