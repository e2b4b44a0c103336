"""Environments lent out and taken back."""

import pytest

from epo_kernels.train.envs import EnvironmentFailure
from epo_kernels.train.envs.idle import IdleEnvironments


class Closable:
    closed = False

    def close(self):
        self.closed = True


def test_one_that_comes_back_is_lent_again_and_two_at_once_are_two():
    idle = IdleEnvironments(Closable)
    with idle.borrow() as first, idle.borrow() as second:
        assert first is not second
    with idle.borrow() as again:
        assert again is first


def test_one_comes_back_from_an_error_but_not_from_its_own_failure():
    idle = IdleEnvironments(Closable)
    with pytest.raises(ValueError, match="no such task"), idle.borrow() as environment:
        raise ValueError("no such task")
    with pytest.raises(EnvironmentFailure), idle.borrow() as again:
        raise EnvironmentFailure("it died")
    assert again is environment
    assert again.closed
    with idle.borrow() as fresh:
        assert fresh is not environment


def test_closing_ends_the_idle_ones_and_goes_on_lending():
    idle = IdleEnvironments(Closable)
    with idle.borrow() as first:
        pass
    idle.close()
    assert first.closed
    with idle.borrow() as second:
        assert not second.closed
