"""Without a GPU, Triton's interpreter runs the kernels.

Triton reads the switch when it is imported; this file is read before any test module, in every pytest-xdist worker too.
"""

import os
import sys

import pytest
import torch

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def interpreter():
    """Triton's interpreter, or the reason why it is not available to these tests."""
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: tests/gpu runs the same tests on it, without the interpreter")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.fail("triton was imported before tests/backends/conftest.py; set TRITON_INTERPRET=1 in the environment")
