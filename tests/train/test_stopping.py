"""Signals: which ones request a stop, and when a later one ends the run."""

import multiprocessing
import os
import signal

import pytest

import epo_kernels.train.io.stopping as stopping
from epo_kernels.train.io.stopping import SIGNALS, Stopped, StopRequest


@pytest.fixture(autouse=True)
def _not_ignored():
    """SIGHUP as in a terminal, also where the tests themselves run under nohup."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


def send(*numbers):
    for number in numbers:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_the_first_asks_and_those_within_a_second_are_the_same_request(number):
    handlers = [signal.getsignal(other) for other in SIGNALS]
    with StopRequest() as stop:
        stop.check()
        send(number, number, *SIGNALS)
        with pytest.raises(Stopped, match=f"stopped by {number.name}"):
            stop.check()
    assert [signal.getsignal(other) for other in SIGNALS] == handlers


def test_ctrl_c_after_that_interrupts(monkeypatch):
    monkeypatch.setattr(stopping, "SAME_REQUEST", 0.0)
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        send(signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_any_other_after_that_ends_the_process(monkeypatch, number):
    def work():
        with StopRequest():
            send(signal.SIGINT, number)
        os._exit(0)

    monkeypatch.setattr(stopping, "SAME_REQUEST", 0.0)
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -number


def test_nohup_outlives_its_terminal():
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            send(signal.SIGHUP)
            stop.check()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, former)


def test_a_terminal_that_is_gone_takes_no_message(monkeypatch):
    def gone(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "write", gone)
    with StopRequest() as stop:
        send(signal.SIGHUP)
        with pytest.raises(Stopped):
            stop.check()
