"""If the reader of stdout goes away, only text is lost."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

from epo_kernels.train.io.display import Display
from epo_kernels.train.io.streams import lasting_streams


@pytest.fixture(params=["pipe", "terminal"])
def abandoned(request):
    """A stream whose other end is closed: writing fails by EPIPE or EIO."""
    other, own = os.pipe() if request.param == "pipe" else os.openpty()
    os.close(other)
    with contextlib.suppress(OSError), open(own, "w") as stream:
        yield stream


def test_nothing_is_raised_while_writing_or_at_the_end(abandoned):
    with contextlib.redirect_stdout(abandoned), contextlib.redirect_stderr(abandoned), lasting_streams():
        with Display(Console()) as display, display.bar("rollout", 4) as advance:
            for done in range(4):
                advance(done)
                display.say("step")
        sys.stdout.write("x" * 100_000)
        sys.stderr.write("kept in the buffer")
        os.write(abandoned.fileno(), b"by a library, directly")
    abandoned.flush()


def test_a_full_disk_behind_a_log_costs_the_text_that_it_refuses():
    class Full(io.StringIO):
        full = True

        def write(self, text):
            if self.full:
                raise OSError(28, "No space left on device")
            return super().write(text)

    log = Full()
    with contextlib.redirect_stdout(log), lasting_streams():
        sys.stdout.write("lost\n")
        log.full = False
        sys.stdout.write("told\n")
    assert log.getvalue() == "told\n"


def test_what_an_encoding_lacks_is_escaped():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    with contextlib.redirect_stdout(stream), lasting_streams():
        sys.stdout.write("tâche │ 1\n")
    assert raw.getvalue() == b"t\\xe2che \\u2502 1\n"


def test_a_stream_closed_before_the_start_is_none(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    with lasting_streams():
        sys.stdout.write("nowhere")
        Display().say("nowhere")


def test_help_into_a_closed_pipe_ends_with_0():
    code = "import sys; from epo_kernels.train.__main__ import main, leave; leave(main(['--help']))"
    reading, writing = os.pipe()
    os.close(reading)
    ended = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, timeout=120)
    os.close(writing)
    assert (ended.returncode, ended.stderr) == (0, b"")
