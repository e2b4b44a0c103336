"""The number of launches of a loss call on a GPU: Triton kernels, counted when called, and PyTorch operators."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import epo_kernels as ek
from epo_kernels.backends import triton_kernels
from tests.backends.matrix import BUSY, busy_case
from tests.cases import to_packed

pytestmark = [
    pytest.mark.usefixtures("interpreter"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton"),
]


class Launches(TorchDispatchMode):
    """Names of the launches: views and empty tensors cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        views = [returned.alias_info is not None for returned in func._schema.returns]
        if not any(views) and "empty" not in func.name():
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Kernel:
    """A kernel that records its launches, and hides how the interpreter runs it."""

    def __init__(self, name: str, kernel, names: list[str]) -> None:
        self.name, self.kernel, self.names = name, kernel, names

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            self.names.append(self.name)
            with _disable_current_modes():
                self.kernel[grid](*args, **kwargs)

        return launch


@pytest.fixture
def launched(monkeypatch):
    monkeypatch.setattr("epo_kernels.inputs.checks.checks_values", lambda device: False)  # as on CUDA
    mode = Launches()
    for name in [name for name in vars(triton_kernels) if name.endswith("_kernel")]:
        monkeypatch.setattr(triton_kernels, name, Kernel(name, getattr(triton_kernels, name), mode.names))

    def of(case):
        logits = case["logits"].clone().requires_grad_()
        mode.names.clear()
        with mode:
            out = ek.epo_loss(**{**case, "logits": logits}, backend="triton")
        forward = list(mode.names)
        mode.names.clear()
        one = torch.ones(())
        with mode:
            torch.autograd.backward(out.loss, one)
        return forward, list(mode.names)

    return of


KERNELS_OF_A_LOSS = ["token_weights_kernel", "row_loss_kernel"]
PUT_METRICS_TOGETHER = ["aten::cat"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_loss_call_is_three_launches(launched, mode, dtype):
    case = busy_case(replace(BUSY, loss_agg_mode=mode), vocab=40, dtype=dtype)
    forward, backward = launched(case)
    assert forward == KERNELS_OF_A_LOSS + PUT_METRICS_TOGETHER
    assert backward == ["scale_kernel"]


def test_a_packed_call_makes_ids_and_lengths_of_cu_seqlens_first(launched):
    forward, backward = launched(to_packed(busy_case(vocab=40), [5, 3, 4])[0])
    assert forward[-3:] == KERNELS_OF_A_LOSS + PUT_METRICS_TOGETHER
    assert len(forward) <= 18  # over (N,) integers
    assert backward == ["scale_kernel"]


@pytest.mark.parametrize(("scope", "dtype"), [("segment", torch.float32), ("token", torch.float16)])
def test_segments_and_float16_read_the_logits_once_a_pass(launched, scope, dtype):
    """Between the two passes the maths is eager, over (B, T) tensors."""
    forward, backward = launched(busy_case(replace(BUSY, band_scope=scope), vocab=40, dtype=dtype))
    assert [name for name in forward if name.endswith("_kernel")] == ["row_statistics_kernel"]
    assert [name for name in backward if name.endswith("_kernel")] == ["row_gradient_kernel"]
