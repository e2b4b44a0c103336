"""The Triton kernels under the interpreter."""

import pytest

from tests.backends.autograd_matrix import AutogradMatrix
from tests.backends.matrix import BackendMatrix


@pytest.mark.usefixtures("interpreter")
class TestTriton(BackendMatrix, AutogradMatrix):
    backend = "triton"
