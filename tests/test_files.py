"""files.py: what is written is there as a whole or not at all; what is read may be anything."""
import errno
import json
import os
import signal
import stat
import subprocess
import sys

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import files
from configurator import Mistake

posix = pytest.mark.skipif(os.name != "posix", reason="permissions, signals and links of POSIX")


@settings(max_examples=200, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=30))
@example(b"[" * 200_000)
@example(b'{"a":' * 100_000)
@example(b"9" * 10_000)
@example(b"\xef\xbb\xbf{}")
@example(b'{"a": NaN}')
@example(b'{"a": 1e999}')
@example(b'{"a": "\\ud800"}')
def test_any_bytes_are_a_dict_or_a_mistake_that_names_the_file(tmp_path, content):
    path = tmp_path / "some.json"
    path.write_bytes(content)
    try:
        value = files.read_json(path)
        assert isinstance(value, dict)
        files.write_json(path, value)  # whatever is read can be written again, and the same
        assert files.read_json(path) == value
    except Mistake as error:
        assert str(path) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("text", ["[]", "null", "5", '"{}"', "true", ""])
def test_json_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "some.json").write_text(text)
    with pytest.raises(Mistake, match="some.json (holds a|is not readable JSON)"):
        files.read_json(tmp_path / "some.json")


def test_a_missing_file_and_one_that_is_not_utf8_are_named(tmp_path):
    with pytest.raises(Mistake, match="none.txt is missing"):
        files.read_text(tmp_path / "none.txt")
    (tmp_path / "bytes.txt").write_bytes(b"abc\xff")
    with pytest.raises(Mistake, match="bytes.txt is not UTF-8 text: .* at byte 3"):
        files.read_text(tmp_path / "bytes.txt")
    with pytest.raises((Mistake, OSError)):
        files.read_text(tmp_path)


# --- a line each ----------------------------------------------------------------------------------

@settings(max_examples=150, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.binary(max_size=12) | st.sampled_from(
    [b"{}", b'{"a": 1}', b"", b" \t", b'{"a": NaN}', b'{"a": "\\ud800"}', b"\xef\xbb\xbf{}",
     b"\xff", b"[" * 100_000, b"{}\r", b'{"a": 1, "a": 2}']), max_size=6), st.booleans())
def test_lines_are_read_up_to_the_first_that_is_no_object_which_is_named(tmp_path, content, ends):
    path = tmp_path / "some.jsonl"
    path.write_bytes(b"\n".join(content) + (b"\n" if ends else b""))
    want, bad = [], None
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if number == 1 and line.startswith(b"\xef\xbb\xbf"):
            line = line[3:]
        if not line.strip():
            continue
        try:
            value = json.loads(line.decode(), parse_constant=int)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            bad = number
            break
        want.append((f"line {number} of {path}", value))
    found = []
    try:
        for where, value in files.read_json_lines(path):
            found.append((where, value))
        assert bad is None
    except Mistake as error:
        assert str(error).startswith(f"line {bad} of {path} ") and "\n" not in str(error)
    assert found == want


def test_of_equal_names_in_a_line_the_last_counts_as_in_json_files(tmp_path):
    (tmp_path / "some.jsonl").write_text('{"a": 1, "b": 2, "a": 3}')
    (tmp_path / "some.json").write_text('{"a": 1, "b": 2, "a": 3}')
    [(_, value)] = files.read_json_lines(tmp_path / "some.jsonl")
    assert value == files.read_json(tmp_path / "some.json") == {"a": 3, "b": 2}


def test_a_line_that_never_ends_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE", 50)
    path = tmp_path / "some.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 41 + b'"}\n{}\n')
    with pytest.raises(Mistake, match="line 1 of .* is longer than 50 bytes"):
        list(files.read_json_lines(path))
    path.write_bytes(b'{"a": "' + b"x" * 40 + b'"}\n{}\n')  # 49 bytes and the line's end
    assert [where.split()[1] for where, _ in files.read_json_lines(path)] == ["1", "2"]
    path.write_bytes(b"{}\n" + b" " * 60)
    with pytest.raises(Mistake, match="line 2 of .* is longer than 50 bytes"):
        list(files.read_json_lines(path))


@posix
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: None,
                                  lambda path: os.symlink("/dev/null", path)])
def test_lines_are_read_from_files_alone(tmp_path, make):
    make(tmp_path / "some.jsonl")
    with pytest.raises(Mistake, match="some.jsonl is missing, or not a file"):
        list(files.read_json_lines(tmp_path / "some.jsonl"))


def test_lines_are_read_one_at_a_time(tmp_path):
    """A bad line is found only once the lines before it are used: a file may be very large."""
    (tmp_path / "some.jsonl").write_text("{}\n{}\nnonsense\n")
    lines = files.read_json_lines(tmp_path / "some.jsonl")
    assert [next(lines)[1], next(lines)[1]] == [{}, {}]
    with pytest.raises(Mistake, match="line 3"):
        next(lines)


# --- written and read -----------------------------------------------------------------------------

@settings(max_examples=50, deadline=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
                       st.none() | st.integers() | st.booleans() | st.floats(allow_nan=False,
                                                                            allow_infinity=False)
                       | st.text(st.characters(exclude_categories=["Cs"]), max_size=5)))
def test_what_is_written_is_read_again(tmp_path, value):
    files.write_json(tmp_path / "value.json", value)
    assert files.read_json(tmp_path / "value.json") == value
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_json_has_no_nan_and_the_file_before_stays(tmp_path, value):
    files.write_json(tmp_path / "value.json", {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "value.json", value)
    assert json.loads((tmp_path / "value.json").read_text()) == {"a": 1}
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_before_and_no_other(tmp_path, monkeypatch, name):
    path = tmp_path / "file.txt"
    files.write_text(path, "before")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, name, full)
        with pytest.raises(OSError):
            files.write_text(path, "after")
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["file.txt"]


@posix
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_leaves_the_file_before_or_the_one_after(tmp_path, moment):
    path = tmp_path / "file.txt"
    path.write_text("before")
    text = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import files
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
os.{moment} = kill
files.write_text({str(path)!r}, "after" * 1000)
"""
    killed = subprocess.run([sys.executable, "-c", text], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "before"


@posix
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """The order of fsync and rename, of a file and of a folder: what a power cut depends on."""
    done, fsync, replace = [], os.fsync, os.replace

    def synced(fd):
        done.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))
        fsync(fd)

    def renamed(source, target):
        done.append(f"renamed to {os.path.basename(target)}")
        replace(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs /proc")
    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", renamed)
    files.write_text(tmp_path / "latest", "step_1")
    assert len(done) == 3 and done[0].startswith(".latest.") and done[0].endswith(".tmp")
    assert done[1:] == ["renamed to latest", tmp_path.name]

    done.clear()
    aside = files.fresh_folder(tmp_path / "step_1")
    (aside / "state").mkdir()
    (aside / "state" / "b").write_text("b")
    (aside / "a").write_text("a")
    files.move_folder(aside, tmp_path / "step_1")
    at = done.index("renamed to step_1")
    assert sorted(done[:at]) == sorted(["a", "b", "state", aside.name])
    assert done[at + 1:] == [tmp_path.name]


@posix
@pytest.mark.parametrize("mask, mode", [(0o022, 0o755), (0o077, 0o700), (0o002, 0o775)])
def test_a_fresh_folder_has_the_usual_permissions(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        folder = files.fresh_folder(tmp_path / "deep" / "run")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert folder.parent == tmp_path / "deep" and list(folder.iterdir()) == []
    assert folder != files.fresh_folder(tmp_path / "deep" / "run")


def test_a_folder_is_not_moved_over_another(tmp_path):
    """Whoever moves makes room first: see checkpoint.discard."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine").write_text("mine")
    aside = files.fresh_folder(tmp_path / "there")
    (aside / "new").write_text("new")
    with pytest.raises(OSError):
        files.move_folder(aside, tmp_path / "there")
    assert (tmp_path / "there" / "mine").read_text() == "mine"
