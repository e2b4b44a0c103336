"""A few hundred draws of tests/fuzz.py; `make fuzz N=10000` makes more."""

import pytest

from tests.fuzz import fuzz


@pytest.mark.parametrize("start", range(0, 400, 50))
def test_cpu(start):
    for seed in range(start, start + 50):
        fuzz(seed, "cpu")


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("start", range(10_000, 10_040, 20))
def test_triton(start):
    for seed in range(start, start + 20):
        fuzz(seed, "triton")
