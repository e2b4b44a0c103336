"""The run's folder: one process at a time, however the last one ended; and unusable folders are rejected."""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import threading
import time

import pytest

import epo_kernels.train.io.run_dir as run_dir_module
from epo_kernels.train.config import ConfigError
from epo_kernels.train.io.run_dir import LOCK, check_usable, held
from tests.train import faults
from tests.train.conftest import command, files_at_most, lines_of, train

HERE = socket.gethostname()


def test_the_holder_is_named_and_the_lock_goes_with_it(tmp_path):
    folder = tmp_path / "runs" / "one"
    with held(folder):
        said = f"in use by process {os.getpid()} on {HERE}, since 20..-..-..T.*Choose another run_dir"
        with pytest.raises(ConfigError, match=said), held(folder):
            pass
        (tmp_path / "link").symlink_to(folder)
        with pytest.raises(ConfigError, match="in use"), held(tmp_path / "link"):
            pass
    assert not folder.exists(), "an empty folder of its own isn't left behind"
    with held(folder):
        pass


def test_a_dead_process_gives_way(tmp_path):
    def die():
        with held(tmp_path):
            if os.fork() == 0:  # a child that outlives it doesn't keep its lock
                time.sleep(2)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert json.loads((tmp_path / LOCK).read_text())["process"] == process.pid
    said = []
    with held(tmp_path, said.append):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()
    assert len(said) == 1
    assert f"took over from process {process.pid} on {HERE}" in said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("host", ["elsewhere", HERE])
@pytest.mark.parametrize("alive", [True, False])
def test_a_holder_out_of_a_lock_s_reach_is_watched(tmp_path, monkeypatch, host, alive):
    """One on another host, or on a filesystem without locks, shows by touching its file that it lives."""
    monkeypatch.setattr(run_dir_module, "HEARTBEAT", 0.1)
    if host == HERE:

        def no_locks(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / LOCK
    path.write_text(json.dumps({"host": host, "process": 7, "since": "2026-01-01T00:00:00+00:00"}))
    ended = threading.Event()

    def beat():
        with path.open() as file:
            run_dir_module._beat(file.fileno(), ended)

    other = threading.Thread(target=beat)
    if alive:
        other.start()
    said = []
    try:
        if alive:
            with pytest.raises(ConfigError, match=f"process 7 on {host}, since 2026-01-01"), held(tmp_path):
                pass
        else:
            with held(tmp_path, said.append):
                assert json.loads(path.read_text())["host"] == HERE
            assert [text.split("; ")[-1].split(" from ")[0] for text in said] == [
                "waiting 0 s to see whether it is still running",
                f"{tmp_path}: took over",
            ]
    finally:
        ended.set()
        if alive:
            other.join()


def test_a_second_run_is_refused_and_the_first_stays_whole(tmp_path, capsys):
    first = faults.start(command(f"run_dir={tmp_path}", "steps=10000", "evaluate.panels=[]"))
    faults.wait_for(tmp_path / "metrics.jsonl", first)
    assert train(f"run_dir={tmp_path}", "seed=1") == 2
    assert f"in use by process {first.pid} on {HERE}" in capsys.readouterr().err
    first.terminate()
    assert faults.end_of(first) == 0
    numbers = [line["training/global_step"] for line in lines_of(tmp_path)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert not (tmp_path / LOCK).exists()


@pytest.fixture
def nothing_computed(monkeypatch):
    def computed(*_):
        raise AssertionError("the run began")

    monkeypatch.setattr("epo_kernels.train.build.make_suite", computed)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
@pytest.mark.parametrize("trouble", ["file", "file above", "file within", "folder within", "not writable"])
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, monkeypatch, capsys, nothing_computed, trouble, flags):
    run_dir = tmp_path / "run"
    if trouble == "file":
        run_dir.write_text("mine")
    elif trouble == "file above":
        run_dir.write_text("mine")
        run_dir = run_dir / "below"
    elif trouble == "not writable":
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    else:
        run_dir.mkdir()
        (run_dir / LOCK).touch()
        if trouble == "file within":
            (run_dir / "checkpoints").write_text("mine")
        else:
            (run_dir / "metrics.jsonl").mkdir()
    assert train(f"run_dir={run_dir}", *flags) == 2
    assert f"run_dir={run_dir} cannot be used: " in capsys.readouterr().err


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_so_is_one_on_a_full_or_read_only_disk(tmp_path, monkeypatch, capsys, nothing_computed, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(run_dir_module.Holder, "this", refuse)  # as the first bytes are written
    assert train(f"run_dir={tmp_path / 'run'}") == 2
    assert f"cannot be used: {os.strerror(number)}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_and_one_that_takes_no_byte(tmp_path, capsys, nothing_computed):
    with files_at_most(0):
        assert train(f"run_dir={tmp_path / 'run'}") == 2
    assert "cannot be used: File too large" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["resume=never"]])
@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "wandb/latest", "checkpoints/global_step_5/data.pt"])
def test_another_project_s_files_are_left_alone(tmp_path, capsys, nothing_computed, name, flags):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("defaults: [model]\n")
    assert train(f"run_dir={tmp_path}", *flags) == 2
    error = capsys.readouterr().err
    assert "contains files that this driver did not write" in error
    assert name.split("/")[0] in error
    assert path.read_text() == "defaults: [model]\n"
    assert not (tmp_path / LOCK).exists()


def test_what_a_run_left_unfinished_or_others_keep_beside_it_is_no_hindrance(whole_run, tmp_path):
    check_usable(whole_run)
    (tmp_path / "slurm-17.out").write_text("log")
    check_usable(tmp_path)
    with held(tmp_path):
        (tmp_path / "base").mkdir()  # and then it failed
    check_usable(tmp_path)
