"""Files and folders that are complete or absent, whoever is killed or fails while writing them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nestlearn.atomic import atomic_write, publish, remove_leftovers, staging, write_text

WRITE_HALF = """
import sys, time
from pathlib import Path
from nestlearn.atomic import atomic_write
with atomic_write(Path(sys.argv[1]), "it") as path:
    if sys.argv[2] == "folder":
        path.mkdir()
        path = path / "a"
    path.write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""

# Stops after the old folder was moved away, before the new one is in its place.
WRITE_AND_STOP_BETWEEN_RENAMES = """
import os, sys, time
from pathlib import Path
from nestlearn import atomic
rename = os.replace
def replace(source, target):
    if Path(source).name == Path(target).name:
        print("ready", flush=True)
        time.sleep(60)
    rename(source, target)
os.replace = replace
with atomic.atomic_write(Path(sys.argv[1]), "it") as path:
    path.mkdir()
    (path / "a").write_text("new")
"""


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """start(program, *arguments) -> a process that runs the program and has printed "ready"."""
    started = []

    def run(program: str, *arguments: object) -> subprocess.Popen[bytes]:
        child = subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE)
        started.append(child)
        assert child.stdout is not None and child.stdout.readline() == b"ready\n"
        return child

    yield run
    for child in started:
        child.kill()
        child.wait()
        child.stdout.close()


def kill(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()


@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("then", ["write", "write another", "open"])
def test_what_a_killed_writer_leaves_is_removed(start, tmp_path: Path, kind: str, then: str) -> None:
    path = tmp_path / "it"
    old = path if kind == "file" else path / "a"
    write_text(old, "old")
    child = start(WRITE_HALF, path, kind)
    remove_leftovers(tmp_path)
    write_text(tmp_path / "other", "other")
    assert len(os.listdir(tmp_path)) == 3, "the writer lives, so what it has written so far stays"
    kill(child)
    assert old.read_text() == "old" and len(os.listdir(tmp_path)) == 3
    if then == "open":
        remove_leftovers(tmp_path)
    else:
        write_text(tmp_path / "other" if then == "write another" or kind == "folder" else path, "old")
    assert sorted(os.listdir(tmp_path)) == ["it", "other"] and old.read_text() == "old"


@pytest.mark.parametrize("then", ["write", "open"])
def test_a_folder_survives_a_kill_between_the_two_renames(start, tmp_path: Path, then: str) -> None:
    path = tmp_path / "it"
    write_text(path / "a", "old")
    write_text(path / "b", "old")
    kill(start(WRITE_AND_STOP_BETWEEN_RENAMES, path))
    assert not path.exists()
    if then == "open":
        remove_leftovers(tmp_path)
    else:
        with pytest.raises(OSError, match="disk"), atomic_write(path, "it"):
            raise OSError("no space left on the disk")
    assert os.listdir(tmp_path) == ["it"] and os.listdir(path) == ["a"] and (path / "a").read_text() == "new"


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("disk full"), KeyboardInterrupt()])
def test_a_failure_changes_nothing(tmp_path: Path, error: BaseException) -> None:
    write_text(tmp_path / "it", "old")
    kind = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(kind) as caught, atomic_write(tmp_path / "it", "the thing", "try again") as path:
        path.write_text("half")
        raise error
    assert os.listdir(tmp_path) == ["it"] and (tmp_path / "it").read_text() == "old"
    if kind is OSError:
        assert str(caught.value) == (
            f"could not write the thing to {tmp_path}/it: disk full. Nothing there was changed; try again."
        )


def test_a_folder_that_cannot_be_moved_into_place_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rename = tmp_path / "it", os.replace
    write_text(path / "a", "old")

    def replace(source: Path, target: Path) -> None:
        if Path(target) == path and Path(source).name == "it":
            monkeypatch.setattr(os, "replace", rename)
            raise OSError("the disk was pulled out")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="pulled out"), staging(path) as folder:
        write_text(folder / "it" / "a", "new")
        publish(folder / "it", path)
    assert os.listdir(tmp_path) == ["it"] and (path / "a").read_text() == "old"


def test_writers_of_one_file_take_turns(tmp_path: Path) -> None:
    path, failed = tmp_path / "it", []

    def work(letter: str) -> None:
        try:
            for _ in range(20):
                write_text(path, letter * 100_000)
                assert len(set(path.read_text())) == 1 and path.stat().st_size == 100_000
        except (OSError, AssertionError) as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and os.listdir(tmp_path) == ["it"]


def test_a_folder_that_goes_while_it_is_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, calls = os.mkdir, []

    def mkdir(path: Any, *given: Any) -> None:
        """The first time the folder is there, and is removed before anyone can look."""
        calls.append(path)
        if len(calls) == 1:
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        make(path, *given)

    monkeypatch.setattr(os, "mkdir", mkdir)
    write_text(tmp_path / "it", "text")
    assert len(calls) == 2 and (tmp_path / "it").read_text() == "text"


def test_a_file_in_the_place_of_a_staging_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ".it.part").write_text("mine")
    with pytest.raises(OSError, match="could not write"):
        write_text(tmp_path / "it", "text")
    assert (tmp_path / ".it.part").read_text() == "mine"


def test_folders_of_others_stay(tmp_path: Path) -> None:
    """Browsers write NAME.part too."""
    (tmp_path / ".download.part").mkdir()
    (tmp_path / ".download.part" / "film").touch()
    (tmp_path / ".file.part").touch()
    remove_leftovers(tmp_path)
    write_text(tmp_path / "it", "text")
    assert sorted(os.listdir(tmp_path)) == [".download.part", ".file.part", "it"]
    assert (tmp_path / ".download.part" / "film").exists()
