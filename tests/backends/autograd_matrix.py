"""Tests of autograd and torch.compile for every fused backend: subclass `AutogradMatrix` as `BackendMatrix`."""

from __future__ import annotations

import copy
import os
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.backends import choose_backend
from epo_kernels.fused import ops
from tests.backends.matrix import BUSY, busy_case, moved
from tests.cases import run


class AutogradMatrix:
    backend = ""
    device = "cpu"

    def case(self, **arguments):
        return moved(busy_case(**{"vocab": 40, **arguments}), self.device)

    def loss(self, case, logits, **arguments):
        return ek.epo_loss(**{**case, "logits": logits, **arguments}, backend=self.backend)

    def kernels(self):
        return choose_backend(self.backend, torch.device(self.device)).kernels

    # ---- backward ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("upstream", [0.3, -2.0, 1024.0])
    def test_upstream_multiplies_the_gradient(self, upstream, dtype):
        case = self.case(dtype=dtype)
        _, gradient = run(case, self.backend, upstream=upstream)
        _, expected = run(case, "reference", upstream=upstream)
        assert_close(gradient, expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-6 * abs(upstream))

    def test_an_upstream_of_one_touches_nothing(self):
        case = self.case()
        logits = case["logits"].requires_grad_()
        out = self.loss(case, logits)
        node = out.loss.grad_fn
        saved, _ = node.saved_tensors
        expected = saved.clone()
        saved.data[0, 0, 0] = 123.0  # a backward that recomputed or replaced the gradient would lose this
        (gradient,) = torch.autograd.grad(out.loss, logits)
        assert gradient.data_ptr() == saved.data_ptr()
        expected[0, 0, 0] = 123.0
        assert_close(gradient, expected, rtol=0, atol=0)

    def test_scale_takes_any_strides(self):
        wide = torch.randn(2, 6, 50, device=self.device)
        for gradient in (wide, wide[:, 1:-1, 3:40], wide.permute(2, 0, 1)):
            expected = gradient * 0.25
            untouched = wide.clone()
            self.kernels().scale(gradient, torch.tensor(1.0, device=self.device), gradient)
            assert_close(wide, untouched, rtol=0, atol=0)
            self.kernels().scale(gradient, torch.tensor(0.25, device=self.device), gradient)
            assert_close(gradient, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_scale_does_not_round_the_factor(self, dtype):
        """As PyTorch does on CUDA alone, where a 0-d factor is cast to the dtype of the product."""
        wide = torch.randn(2, 6, 50, device=self.device, dtype=dtype)
        truncates = self.backend == "triton" and self.device == "cpu" and dtype == torch.bfloat16  # the interpreter
        for part in (wide, wide[:, :-1], wide[:, :, :-1], wide.permute(2, 0, 1), wide.permute(1, 0, 2)):
            expected = (part.float() * 0.3).to(dtype)
            self.kernels().scale(part, torch.tensor(0.3, device=self.device), part)
            assert_close(part, expected, rtol=torch.finfo(dtype).eps if truncates else 0.0, atol=0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("factor", [1.0, 0.3])
    def test_scale_into_another_tensor_rounds_once(self, factor, dtype):
        memory = torch.randn(6001, device=self.device)
        grid = memory[:6000].view(2, 60, 50)
        given = torch.tensor(factor, device=self.device)
        truncates = self.backend == "triton" and self.device == "cpu" and dtype == torch.bfloat16  # the interpreter
        for gradient in (grid, memory[1:].view(2, 60, 50), grid[:1, :1, :7], grid[:, 1:-1, 3:40], grid[:0]):
            for first in (0, 1, 3):  # of an aligned vector
                whole = torch.full((gradient.numel() + 8,), 7.0, device=self.device, dtype=dtype)
                out = whole[first : first + gradient.numel()].view(gradient.shape)
                untouched = memory.clone()
                self.kernels().scale(gradient, given, out)
                rtol = torch.finfo(dtype).eps if truncates else 0.0
                assert_close(out, (gradient * factor).to(dtype), rtol=rtol, atol=0)
                assert_close(memory, untouched, rtol=0, atol=0)
                around = torch.cat([whole[:first], whole[first + gradient.numel() :]])
                assert torch.equal(around, torch.full_like(around, 7.0))

    def test_a_leaf_takes_the_gradient_without_a_copy(self):
        case = self.case()
        logits = case["logits"].requires_grad_()
        out = self.loss(case, logits)
        place = out.loss.grad_fn.saved_tensors[0].data_ptr()
        out.loss.backward()
        assert logits.grad.data_ptr() == place

    def test_a_second_backward_raises(self):
        case = self.case()
        logits = case["logits"].requires_grad_()
        out = self.loss(case, logits)
        out.loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="retain_graph=True"):
            out.loss.backward()

    @pytest.mark.parametrize("scope", ["token", "segment"])
    def test_double_backward_raises(self, scope):
        case = self.case(cfg=_with_scope(BUSY, scope))
        logits = case["logits"].requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(case, logits).loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match='Use backend="reference"'):
            gradient.sum().backward()

    @pytest.mark.parametrize("scope", ["token", "segment"])
    def test_forward_mode_raises(self, scope):
        case = self.case(cfg=_with_scope(BUSY, scope))
        with torch.autograd.forward_ad.dual_level():
            logits = torch.autograd.forward_ad.make_dual(case["logits"], torch.ones_like(case["logits"]))
            with pytest.raises(RuntimeError, match='Use backend="reference"'):
                self.loss(case, logits)

    def test_two_losses_on_shared_logits(self):
        case = self.case()
        other = {**case, "advantages": -case["advantages"], "cfg": ek.EPOConfig(policy_loss="cispo", entropy_coeff=0.1)}
        hidden = case["logits"].requires_grad_()
        logits = hidden * 1.0
        extra = logits.square().mean()
        total = self.loss(case, logits).loss + 2.0 * self.loss(other, logits).loss + extra
        (gradient,) = torch.autograd.grad(total, hidden)
        leaf = hidden.detach().requires_grad_()
        expected = ek.epo_loss(**{**case, "logits": leaf}, backend="reference").loss
        expected = expected + 2.0 * ek.epo_loss(**{**other, "logits": leaf}, backend="reference").loss
        (expected,) = torch.autograd.grad(expected + leaf.square().mean(), leaf)
        assert_close(gradient, expected, rtol=1e-5, atol=1e-6)

    def test_unequal_micro_batches_add_up(self):
        case = self.case()
        whole = run(case, self.backend)
        count = case["mask"].sum()
        logits = case["logits"].detach().requires_grad_()
        metrics = None
        for part in (slice(0, 1), slice(1, 3)):
            piece = {
                name: value[part] if isinstance(value, torch.Tensor) else value
                for name, value in case.items()
                if name != "entropy_bounds"
            }
            piece["entropy_bounds"] = tuple(bound[part] for bound in case["entropy_bounds"])
            out = self.loss(piece, logits[part], normalizer=count.float())
            out.loss.backward()
            metrics = out.metrics if metrics is None else metrics + out.metrics
        assert_close(logits.grad, whole[1], rtol=1e-5, atol=1e-7)
        assert_close(metrics.values, whole[0].metrics.values, rtol=1e-6, atol=1e-6)

    def test_frozen_logits_and_no_grad_make_no_gradient(self):
        case = self.case()
        assert not self.loss(case, case["logits"]).loss.requires_grad
        with torch.no_grad():
            out = self.loss(case, case["logits"].requires_grad_())
        assert not out.loss.requires_grad
        assert not out.log_probs.requires_grad

    def test_an_unused_loss_gives_no_gradient(self):
        case = self.case()
        logits = case["logits"].requires_grad_()
        log_probs, entropy = ek.log_probs_and_entropy(logits, case["tokens"], backend=self.backend)
        (gradient,) = torch.autograd.grad(entropy.sum(), logits)
        leaf = logits.detach().requires_grad_()
        _, expected = ek.log_probs_and_entropy(leaf, case["tokens"], backend="reference")
        (expected,) = torch.autograd.grad(expected.sum(), leaf)
        assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
        assert log_probs.requires_grad

    # ---- in place ----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("scope", ["token", "segment"])
    @pytest.mark.parametrize("packed", [False, True])
    def test_in_place_overwrites_the_logits(self, packed, scope):
        case = self.case(cfg=_with_scope(BUSY, scope), dtype=torch.bfloat16)
        if packed:
            case = {name: _flat(value) for name, value in case.items()}
            case["cu_seqlens"] = torch.tensor([0, 5, 10, 15], device=self.device)
        _, expected = run(case, self.backend, upstream=0.5)
        hidden = case["logits"].detach().requires_grad_()
        logits = hidden * 1.0
        out = self.loss(case, logits, inplace=True)
        (gradient, passed) = torch.autograd.grad(0.5 * out.loss, [logits, hidden])
        assert gradient.data_ptr() == logits.data_ptr()
        assert_close(gradient, expected, rtol=0, atol=0)
        assert_close(passed, expected, rtol=0, atol=0)

    def test_in_place_refuses_what_it_would_destroy(self):
        case = self.case()
        leaf = case["logits"].requires_grad_()
        for logits in (leaf, leaf[:, :, :]):
            with pytest.raises(ValueError, match="inplace=True must have logits that are not a leaf"):
                self.loss(case, logits, inplace=True)
        row = (leaf[:, :1] * 1.0).expand(leaf.shape)
        with pytest.raises(ValueError, match="expanded ones"):
            self.loss(case, row, inplace=True)

    @pytest.mark.parametrize("scope", ["token", "segment"])
    def test_in_place_is_declared_to_autograd(self, scope):
        case = self.case(cfg=_with_scope(BUSY, scope))
        logits = case["logits"].requires_grad_() * 1.0
        earlier = logits.square().sum()  # has saved the logits
        total = self.loss(case, logits, inplace=True).loss
        if scope == "segment":  # overwritten in backward only
            total.backward(retain_graph=True)
            total = 0.0
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (earlier + total).backward()

    def test_in_place_without_gradient_leaves_the_logits_alone(self):
        case = self.case()
        before = case["logits"].clone()
        self.loss(case, case["logits"], inplace=True)
        assert_close(case["logits"], before, rtol=0, atol=0)

    # ---- around it ---------------------------------------------------------------------------------------------------

    def test_autocast_keeps_the_dtype_of_the_logits(self):
        case = self.case(dtype=torch.bfloat16)
        expected = run(case, self.backend)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            out, gradient = run(case, self.backend)
        assert out.loss.dtype == torch.float32
        assert_close(out.loss, expected[0].loss, rtol=0, atol=0)
        assert_close(gradient, expected[1], rtol=0, atol=0)

    def test_loss_scaling_of_float16(self):
        """GradScaler by hand: its scale of the loss is divided out of the gradient."""
        case = self.case(dtype=torch.float16)
        scaler = torch.amp.GradScaler(self.device, init_scale=2.0**12)
        weight = torch.eye(40, device=self.device, requires_grad=True)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        logits = case["logits"].float() @ weight
        scaler.scale(self.loss(case, logits.half()).loss).backward()
        scaler.unscale_(optimizer)
        _, expected = run(case, "reference")
        expected = torch.einsum("btv,btw->vw", case["logits"].float(), expected.float())
        assert_close(weight.grad, expected, rtol=5e-3, atol=5e-4)

    def test_checkpointing(self):
        case = self.case()
        weight = torch.randn(40, 40, device=self.device, requires_grad=True)

        def forward(x):
            return self.loss(case, x @ weight).loss

        (expected,) = torch.autograd.grad(forward(case["logits"]), weight)
        loss = torch.utils.checkpoint.checkpoint(forward, case["logits"], use_reentrant=False)
        (gradient,) = torch.autograd.grad(loss, weight)
        assert_close(gradient, expected, rtol=0, atol=0)

    def test_distributed_data_parallel(self, tmp_path):
        case = self.case()
        store = torch.distributed.FileStore(os.fspath(tmp_path / "store"), 1)
        name = "nccl" if self.device == "cuda" else "gloo"
        torch.distributed.init_process_group(name, store=store, rank=0, world_size=1)
        try:
            head = torch.nn.Linear(40, 40, device=self.device)
            alone = copy.deepcopy(head)
            parallel = torch.nn.parallel.DistributedDataParallel(head)
            self.loss(case, parallel(case["logits"])).loss.backward()
            self.loss(case, alone(case["logits"])).loss.backward()
        finally:
            torch.distributed.destroy_process_group()
        assert_close(head.weight.grad, alone.weight.grad, rtol=0, atol=0)

    # ---- torch.compile -----------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("scope", ["token", "segment"])
    def test_compiles_whole(self, scope):
        case = self.case(cfg=_with_scope(BUSY, scope), temperature=0.8, logit_softcap=5.0)

        def step(logits):
            return self.loss(case, logits)

        def both(function):
            torch._dynamo.reset()
            logits = case["logits"].detach().requires_grad_()
            out = function(logits)
            (gradient,) = torch.autograd.grad(out.loss * 0.5, logits)
            return out, gradient

        expected, expected_gradient = both(step)
        out, gradient = both(torch.compile(step, fullgraph=True, backend="aot_eager"))
        assert_close(out.loss, expected.loss, rtol=1e-6, atol=1e-6)
        assert_close(out.metrics.values, expected.metrics.values, rtol=1e-6, atol=1e-6)
        assert_close(gradient, expected_gradient, rtol=1e-5, atol=1e-7)

    def test_a_schedule_compiles_once(self):
        case = self.case(batch=1, time=2)
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        torch._dynamo.reset()

        @torch.compile(fullgraph=True, backend=counter)
        def step(logits, entropy_coeff, penalty_weight):
            return self.loss(case, logits, entropy_coeff=entropy_coeff, penalty_weight=penalty_weight).loss

        for i in range(20):
            logits = case["logits"].detach().requires_grad_()
            schedule = [torch.tensor(value, device=self.device) for value in (0.1 / (i + 1), 1.0 + 0.05 * i)]
            loss = step(logits, *schedule)
            loss.backward()
            if i in (0, 19):
                expected = self.loss(case, case["logits"], entropy_coeff=schedule[0], penalty_weight=schedule[1]).loss
                assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        assert counter.frame_count == 1

    def test_log_probs_compile(self):
        case = self.case()

        @torch.compile(fullgraph=True, backend="aot_eager")
        def score(logits):
            return ek.log_probs_and_entropy(logits, case["tokens"], entropy=False, backend=self.backend)[0]

        logits = case["logits"].requires_grad_()
        log_probs = score(logits)
        expected = ek.log_probs_and_entropy(logits, case["tokens"], entropy=False, backend=self.backend)[0]
        assert_close(log_probs, expected)
        assert_close(*(torch.autograd.grad(value.sum(), logits)[0] for value in (log_probs, expected)))

    @pytest.mark.parametrize("entropy", [True, False])
    def test_operators_keep_their_contract(self, entropy):
        case = self.case()
        logits = case["logits"].requires_grad_()
        rows = (logits, case["tokens"] % 38, case["mask"], torch.tensor(0.8, device=self.device), 38, None, 1.5)
        torch.library.opcheck(ops.row_statistics, (*rows, entropy, self.backend))
        statistics = ops.row_statistics(
            *(x.detach() if isinstance(x, torch.Tensor) else x for x in rows), entropy, self.backend
        )
        upstream = torch.randn(3, 5, device=self.device)
        torch.library.opcheck(
            ops.row_gradient,
            (logits.detach(), *rows[1:], list(statistics), upstream, upstream if entropy else None, self.backend),
        )


def _with_scope(cfg, scope):
    return replace(cfg, band_scope=scope)


def _flat(value):
    if isinstance(value, tuple):
        return tuple(map(_flat, value))
    return value.flatten(0, 1) if isinstance(value, torch.Tensor) and value.dim() >= 2 else value
