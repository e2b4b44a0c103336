"""Demonstrations stored in files."""

from pathlib import Path

import pytest

from epo_kernels.train.envs import EnvConfig, make_suite
from epo_kernels.train.envs.demonstrations import (
    borrow_cache,
    cache_folder,
    read_demonstration,
    write_demonstration,
)


def test_what_is_written_is_read(tmp_path):
    suite = make_suite(EnvConfig(name="practice"))
    demonstration = suite.demonstrate(suite.tasks("train")[0])
    path = tmp_path / "walk" / "0.json"
    assert read_demonstration(path) is None
    write_demonstration(path, demonstration)
    assert read_demonstration(path) == demonstration
    assert [file.name for file in path.parent.iterdir()] == ["0.json"], "no temporary file stays behind"


def test_a_borrowed_cache_serves_and_stays_as_it_is(tmp_path):
    suite = make_suite(EnvConfig(name="practice"))
    first, second = (suite.demonstrate(task) for task in suite.tasks("train")[:2])
    cache, borrowed = tmp_path / "cache", tmp_path / "borrowed"
    write_demonstration(cache / "walk" / "0.json", first)
    (cache / ".unfinished-x").mkdir()
    borrowed.mkdir()
    assert borrow_cache(str(cache), str(borrowed)) == str(borrowed)
    assert read_demonstration(borrowed / "walk" / "0.json") == first
    assert not (borrowed / ".unfinished-x").exists()
    for name in ("0.json", "1.json"):
        write_demonstration(borrowed / "walk" / name, second)
    assert read_demonstration(borrowed / "walk" / "0.json") == second
    assert read_demonstration(cache / "walk" / "0.json") == first
    assert [path.name for path in (cache / "walk").iterdir()] == ["0.json"]
    empty = tmp_path / "empty"
    assert borrow_cache(str(tmp_path / "no cache"), str(empty)) == str(empty)
    assert not empty.exists()


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    suite = make_suite(EnvConfig(name="practice"))
    first, second = (suite.demonstrate(task) for task in suite.tasks("train")[:2])
    path = tmp_path / "0.json"
    write_demonstration(path, first)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("epo_kernels.train.envs.demonstrations.json.dump", full)
    with pytest.raises(OSError, match="No space left"):
        write_demonstration(path, second)
    assert read_demonstration(path) == first
    assert [file.name for file in tmp_path.iterdir()] == ["0.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"task": {"name": "walk"}}'])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "0.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"0\.json does not contain a demonstration.*delete the file"):
        read_demonstration(path)


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert cache_folder(None) == Path("/elsewhere/epo_kernels")
    assert cache_folder("/mine") == Path("/mine")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder(None) == Path.home() / ".cache" / "epo_kernels"
