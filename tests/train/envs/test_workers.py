"""Programs in separate processes, without an environment."""

import os
import signal

import pytest

from epo_kernels.train.envs import EnvConfig, EnvironmentFailure, make_suite
from epo_kernels.train.envs.workers import Worker

MODULE = """
import sys, time

class Parrot:
    def __init__(self, luck=True):
        self.luck = luck

    def say(self, text):
        print("on its own behalf")
        return text

    def fail(self, text):
        raise ValueError(text)

    def sleep(self):
        time.sleep(60)

    def die(self):
        sys.exit("out of luck")
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    (tmp_path / "parrot.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    worker = Worker("parrot:Parrot", "a parrot", 60, luck=False)
    yield worker
    worker.close()


def test_answers_of_any_size_and_alphabet(worker):
    for text in ("", "é\ud800\n\0", "x" * 10**6):
        assert worker.call("say", 60, text=text) == text


def test_an_error_is_told_and_the_worker_goes_on(worker):
    with pytest.raises(EnvironmentFailure, match="a parrot failed: ValueError: no such thing"):
        worker.call("fail", 60, text="no such thing")
    assert worker.call("say", 60, text="hello") == "hello"


def test_a_late_answer_names_the_setting(worker):
    with pytest.raises(EnvironmentFailure, match=r"within 0\.1 s.*raise env\.step_timeout"):
        worker.call("sleep", 0.1)


def test_last_words_are_told(worker):
    with pytest.raises(EnvironmentFailure, match=r"ended with code 1.*out of luck"):
        worker.call("die", 60)
    with pytest.raises(EnvironmentFailure, match="ended with code 1"):
        worker.call("say", 60, text="hello")


def test_a_killed_worker_is_told(worker):
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFailure, match="ended with code -9"):
        worker.call("say", 60, text="hello")


def test_closing_twice_ends_it_once(worker):
    worker.close()
    worker.close()
    assert worker.process.poll() == -9


def test_one_that_does_not_start_is_told():
    with pytest.raises(EnvironmentFailure, match=r"a parrot failed: ModuleNotFoundError.*'no_such_module'"):
        Worker("no_such_module:Parrot", "a parrot", 60)


def test_an_unknown_method_is_told(worker):
    with pytest.raises(EnvironmentFailure, match=r"AttributeError.*'sing'"):
        worker.call("sing", 60)


def test_alfworld_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("epo_kernels.train.envs.registry.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'epo-kernels\[alfworld\]'"):
        make_suite(EnvConfig(name="alfworld"))
