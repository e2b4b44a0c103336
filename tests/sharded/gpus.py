"""Cases over NCCL, with one GPU per rank: called as (rank, world) on every rank."""

from __future__ import annotations

import torch
from torch import distributed as dist
from torch.testing import assert_close

import epo_kernels as ek
from tests.backends.matrix import busy_case, moved
from tests.cases import run

TOKENS, WIDTH, VOCABULARY = 1024, 256, 8192


def case_linear_loss_equals_the_whole(rank, world):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, WIDTH, generator=generator) / 8 for n in (TOKENS, VOCABULARY))
    tokens = torch.randint(VOCABULARY, (TOKENS,), generator=generator).cuda()
    advantages, mask = torch.randn(TOKENS, generator=generator).cuda(), torch.arange(TOKENS).cuda() % 5 > 0
    columns = slice(0, 3000) if rank == 0 else slice(3000, VOCABULARY)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):

        def loss(columns, dtype=dtype, **keywords):
            leaves = [value.to("cuda", dtype).requires_grad_() for value in (hidden, weight[columns])]
            chunk = 256 * VOCABULARY * dtype.itemsize
            cfg = ek.EPOConfig(entropy_coeff=0.1)
            out = ek.linear_epo_loss(*leaves, tokens, None, advantages, mask, cfg, max_chunk_bytes=chunk, **keywords)
            out.loss.backward()
            return out, [leaf.grad.float() for leaf in leaves]

        whole, (hidden_gradient, weight_gradient) = loss(slice(None))
        ours, gradients = loss(columns, group=dist.group.WORLD)
        assert_close(ours.entropy, whole.entropy, rtol=tolerance, atol=tolerance)
        for got, expected in zip(gradients, (hidden_gradient, weight_gradient[columns]), strict=True):
            assert (got - expected).norm() <= tolerance * expected.norm()


def case_logits_in_columns(rank, world):
    case = moved(busy_case(vocab=1000), "cuda")
    whole, gradient = run(case, "auto")
    columns = slice(0, 300) if rank == 0 else slice(300, 1000)
    part = {**case, "logits": case["logits"][..., columns].contiguous(), "group": dist.group.WORLD}
    ours, own_gradient = run(part, "auto")
    assert_close(ours.loss, whole.loss, rtol=1e-5, atol=1e-6)
    assert_close(own_gradient, gradient[..., columns], rtol=1e-4, atol=1e-6)


def case_sums_over_ranks(rank, world):
    case = moved(busy_case(vocab=100), "cuda")
    metrics = run(case, "auto")[0].metrics
    assert_close(metrics.all_reduce().values, world * metrics.values, rtol=1e-12, atol=0)
    history = ek.EntropyHistory(3)
    history.update(case["tokens"] % 3, torch.ones_like(case["advantages"]), case["mask"])
    history.commit(group=dist.group.WORLD)
    assert history.means().tolist() == [1.0] * 3
