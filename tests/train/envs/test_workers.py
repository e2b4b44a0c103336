"""Programs in processes of their own, without any environment in them."""

import os
import signal
import textwrap

import pytest

from epo_kernels.train.envs import EnvConfig, EnvironmentFailure, make_suite
from epo_kernels.train.envs.workers import Worker

PROGRAM = """
import json, sys, time
print('{"answer": "ready"}', flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request["call"] == "sleep":
        time.sleep(60)
    if request["call"] == "die":
        sys.exit("out of luck")
    print(json.dumps({request["call"]: request["arguments"].get("text", "")}), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    program = tmp_path / "json.py"  # must not shadow the module that it imports
    program.write_text(textwrap.dedent(PROGRAM))
    worker = Worker(program, "a parrot", 60, {})
    yield worker
    worker.close()


def test_answers_of_any_size_and_alphabet(worker):
    for text in ("", "é\ud800\n\0", "x" * 10**6):
        assert worker.call("answer", 60, text=text) == text


def test_an_error_is_told_and_the_worker_goes_on(worker):
    with pytest.raises(EnvironmentFailure, match="a parrot failed: no such thing"):
        worker.call("error", 60, text="no such thing")
    assert worker.call("answer", 60, text="hello") == "hello"


def test_a_late_answer_names_the_setting(worker):
    with pytest.raises(EnvironmentFailure, match=r"within 0\.1 s.*raise env\.step_timeout"):
        worker.call("sleep", 0.1)


def test_last_words_are_told(worker):
    with pytest.raises(EnvironmentFailure, match=r"ended with code 1.*out of luck"):
        worker.call("die", 60)
    with pytest.raises(EnvironmentFailure, match="ended with code 1"):
        worker.call("answer", 60)


def test_a_killed_worker_is_told(worker):
    os.kill(worker.process.pid, signal.SIGKILL)
    with pytest.raises(EnvironmentFailure, match="ended with code -9"):
        worker.call("answer", 60)


def test_closing_twice_ends_it_once(worker):
    worker.close()
    worker.close()
    assert worker.process.poll() == -9


def test_one_that_does_not_start_is_told(tmp_path):
    program = tmp_path / "program.py"
    program.write_text("import no_such_package")
    with pytest.raises(EnvironmentFailure, match=r"ended with code 1.*No module named 'no_such_package'"):
        Worker(program, "a parrot", 60, {})


def test_alfworld_without_its_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'epo-kernels\[alfworld\]'"):
        make_suite(EnvConfig(name="alfworld"))
