"""Cases of ranks with a batch each, and of DTensors: called as (rank, world) on every rank, against one process."""

from __future__ import annotations

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

import epo_kernels as ek
from epo_kernels.metrics import METRIC_NAMES
from tests.backends.matrix import COUNTS, busy_case
from tests.cases import POLICY_VARIANTS, metrics_of, policy_config, run
from tests.sharded.vocabulary import FUSED
from tests.test_linear import HINGE, SMALL, Case, V

# ---- sums over ranks -------------------------------------------------------------------------------------------------


def case_metrics_and_normalizer_agree_with_one_process(rank, world):
    case = busy_case(batch=6, time=7, vocab=30)
    count = float(case["mask"].sum())
    expected, gradient = run(case, FUSED)
    mine = slice(rank, None, world)
    part = {name: value[mine] for name, value in case.items() if isinstance(value, torch.Tensor)}
    part["entropy_bounds"] = tuple(bound[mine] for bound in case["entropy_bounds"])
    own, own_gradient = run({**case, **part, "normalizer": count}, FUSED)
    assert_close(own_gradient, gradient[mine], rtol=0, atol=0)
    total = own.loss.detach().clone()
    dist.all_reduce(total)
    assert_close(total, expected.loss.detach(), rtol=1e-6, atol=1e-7)
    summed = dict(zip(METRIC_NAMES, own.metrics.all_reduce().values.tolist(), strict=True))
    for name, value in metrics_of(expected).items():
        if name in COUNTS:
            assert summed[name] == value, name
        else:
            assert_close(summed[name], value, rtol=1e-14, atol=1e-14, msg=name)


def case_histories_agree_to_the_last_bit(rank, world):
    for scope in ("turn", "global"):
        for weighting in ("token", "step"):
            settings = {"num_turns": 7, "scope": scope, "weighting": weighting, "window": 2}
            whole, shared = ek.EntropyHistory(**settings), ek.EntropyHistory(**settings)
            for step in range(3):
                generator = torch.Generator().manual_seed(step)
                turns = torch.randint(7, (1000,), generator=generator)
                entropy = 12 * torch.rand(1000, generator=generator) ** 3
                mask = torch.rand(1000, generator=generator) < 0.7
                whole.update(turns, entropy, mask)
                whole.commit(group=_alone(rank))
                mine = (
                    torch.arange(1000) % (world + 1) == rank
                )  # the rest comes with the last rank, later and backwards
                shared.update(turns[mine], entropy[mine], mask[mine])
                if rank == world - 1:
                    rest = (torch.arange(1000) % (world + 1) == world).nonzero()[:, 0].flip(0)
                    shared.update(turns[rest], entropy[rest], mask[rest])
                shared.commit(group=dist.group.WORLD)
                assert_close(shared.means(), whole.means(), rtol=0, atol=0, equal_nan=True)


_ALONE = []


def _alone(rank):
    """A group of this rank alone."""
    if not _ALONE:
        _ALONE.extend(dist.new_group([other]) for other in range(dist.get_world_size()))
    return _ALONE[rank]


# ---- DTensors --------------------------------------------------------------------------------------------------------


def check_placements(rank, world, hidden_at, weight_at, bias_at=None, expected_gathers=None):
    """Loss, whole gradients, and their placements. None: a plain tensor, the same on every rank."""
    mesh = init_device_mesh("cpu", (world,))
    case, cfg = Case(), ek.EPOConfig(**HINGE)

    def put(value, placement):
        if placement is None:
            return value.clone().requires_grad_()
        return distribute_tensor(value, mesh, [placement]).requires_grad_()

    places = (hidden_at, weight_at, bias_at)
    leaves = [put(value, at) for value, at in zip((case.hidden, case.weight, case.bias), places, strict=True)]
    batch = case.tokens, case.old_log_probs, case.advantages, case.mask
    with CommDebugMode() as told:
        out = ek.linear_epo_loss(*leaves[:2], *batch, cfg, bias=leaves[2], backend="eager", **case.keywords)
    out.loss.backward()
    if expected_gathers is not None:
        functional = {str(op): count for op, count in told.get_comm_counts().items() if "all_gather_into" in str(op)}
        assert sum(functional.values()) == expected_gathers, told.get_comm_counts()
    expected = case.run("reference", cfg)
    assert_close(out.loss.detach(), expected[0], rtol=1e-6, atol=1e-6, check_dtype=False)
    for leaf, at, gradient in zip(leaves, places, expected[3:], strict=True):
        if at is not None:
            assert isinstance(leaf.grad, DTensor)
            assert leaf.grad.placements == (at,)
        whole = leaf.grad if at is None else leaf.grad.full_tensor()
        assert_close(whole, gradient, rtol=1e-6, atol=1e-6)


def case_dtensors_behave_as_their_whole(rank, world):
    check_placements(rank, world, None, Shard(0))
    check_placements(rank, world, None, Shard(1), Shard(0))
    check_placements(rank, world, None, Replicate())
    check_placements(rank, world, Replicate(), Shard(1), Replicate())
    check_placements(rank, world, Shard(0), Replicate(), Shard(0))
    check_placements(rank, world, Shard(2), None)


def case_a_split_vocabulary_is_not_gathered(rank, world):
    check_placements(rank, world, Replicate(), Shard(0), Shard(0), expected_gathers=0)
    check_placements(rank, world, Shard(1), Shard(0), Shard(0), expected_gathers=1)  # hidden alone


def check_logits_as_dtensors(world, case, *placements):
    mesh = init_device_mesh("cpu", (world,))
    expected, gradient = run(case, FUSED)
    for placement in placements:
        leaf = distribute_tensor(case["logits"], mesh, [placement]).requires_grad_()
        out = ek.epo_loss(**{**case, "logits": leaf}, backend=FUSED)
        out.loss.backward()
        assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
        assert leaf.grad.placements == (placement,)
        assert_close(leaf.grad.full_tensor(), gradient, rtol=1e-4, atol=1e-6)


def case_logits_as_dtensors(rank, world):
    check_logits_as_dtensors(world, busy_case(vocab=30), Shard(2), Shard(1), Replicate())
    for name in POLICY_VARIANTS:
        check_logits_as_dtensors(world, busy_case(policy_config(name), vocab=30), Shard(2))


def case_batches_of_their_own_are_averaged(rank, world):
    mesh, case, cfg = init_device_mesh("cpu", (world,)), Case(), ek.EPOConfig()
    total = torch.zeros_like(case.weight)
    for other in range(world):
        hidden = case.hidden + other
        weight = case.weight.clone().requires_grad_()
        case.loss("eager", cfg, hidden, weight, None).loss.backward()
        total += weight.grad / world
        if other == rank:
            mine = hidden
    weight = distribute_tensor(case.weight, mesh, [Shard(0)]).requires_grad_()
    case.loss("eager", cfg, mine, weight, None).loss.backward()
    assert_close(weight.grad.full_tensor(), total, rtol=1e-6, atol=1e-6)


def case_what_makes_no_sense_is_refused(rank, world):
    mesh, case = init_device_mesh("cpu", (world,)), busy_case(vocab=30)
    split = distribute_tensor(case["logits"], mesh, [Shard(2)])
    with pytest.raises(ValueError, match="group must be omitted with DTensors"):
        ek.epo_loss(**{**case, "logits": split, "group": dist.group.WORLD})
    tokens = distribute_tensor(case["tokens"], mesh, [Replicate()])
    with pytest.raises(TypeError, match=r"tokens must be a plain tensor, got a DTensor; pass tokens.full_tensor"):
        ek.epo_loss(**{**case, "tokens": tokens})


# ---- FSDP2 -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A language model whose head is its embedding, and whose forward ends in the loss."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 6)
        self.body = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.head = nn.Linear(6, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, *batch, **keywords):
        hidden = self.body(self.embed(ids))
        return ek.linear_epo_loss(hidden, self.head.weight, *batch, ek.EPOConfig(), backend=FUSED, **keywords)


def batches(case, rank, world):
    """Two micro-batches of a rank, of unequal numbers of tokens: (ids, tokens, old_log_probs, advantages, mask)."""
    columns = torch.arange(50).tensor_split(2 * world)[2 * rank : 2 * rank + 2]
    floats = [value.float() for value in (case.old_log_probs, case.advantages)]
    given = [case.tokens.roll(1, 1), case.tokens, *floats, case.mask]
    return [[value[:, part] for value in given] for part in columns]


def gathers_and_scatters(counts):
    return tuple(sum(n for op, n in counts.items() if word in op) for word in ("gather", "reduce_scatter"))


def case_tied_embedding_under_fsdp2(rank, world):
    case, mesh = Case(torch.float32), init_device_mesh("cpu", (world,))
    count = float(case.mask.sum())
    torch.manual_seed(0)
    whole, model = Tied(), Tied()
    model.load_state_dict(whole.state_dict())
    for other in range(world):
        for micro in batches(case, other, world):
            whole(*micro, normalizer=count, max_chunk_bytes=SMALL).loss.backward()

    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    first, last = batches(case, rank, world)
    counts = []
    for micro, is_last in ((first, False), (last, True)):
        model.set_requires_gradient_sync(is_last)
        model.set_reshard_after_backward(is_last)
        with CommDebugMode() as told:
            # FSDP averages over ranks what the normalizer has made a share of the whole.
            model(*micro, normalizer=count, loss_scale=float(world)).loss.backward()
        counts.append({str(op).split(".")[-1]: number for op, number in told.get_comm_counts().items()})
    # Head and embedding are gathered once for both micro-batches; the body, freed after its forward, in backwards too.
    assert gathers_and_scatters(counts[0]) == (3, 0), counts
    assert gathers_and_scatters(counts[1]) == (1, 2), counts
    for (name, sharded), expected in zip(model.named_parameters(), whole.parameters(), strict=True):
        assert_close(sharded.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def case_mixed_precision_under_fsdp2_leaves_ratios_alone(rank, world):
    """The docs' advice: with the weights that computed the old log-probs every ratio is 1. FSDP2's default raises."""
    case, mesh = Case(torch.float32), init_device_mesh("cpu", (world,))
    ids, tokens, _, advantages, mask = batches(case, rank, world)[0]
    count = torch.tensor(float(mask.sum()))

    def sharded(**policy):
        torch.manual_seed(0)
        model = Tied()
        policy = MixedPrecisionPolicy(torch.bfloat16, **policy)
        fully_shard(model.body, mesh=mesh, mp_policy=policy)
        return fully_shard(model, mesh=mesh, mp_policy=policy)

    model = sharded(reduce_dtype=torch.float32, cast_forward_inputs=False)
    old = model(ids, tokens, None, advantages, mask, normalizer=count).log_probs.detach()
    again = model(ids, tokens, old, advantages, mask, normalizer=count)
    ratios = torch.where(mask.bool(), (again.log_probs - old).exp(), 1)
    assert old.dtype == torch.float32
    assert not torch.equal(old, old.bfloat16().float())
    assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=1e-6)
    assert float(again.metrics.ppo_kl_sum) == pytest.approx(0, abs=1e-6)
    expected = -(advantages * mask).sum() / count
    assert_close(again.metrics.pg_loss.float(), expected, rtol=1e-6, atol=1e-6)

    for old_log_probs, name in ((old, "old_log_probs"), (None, "normalizer")):
        with pytest.raises(TypeError, match=rf"{name} must be float32.*cast_forward_inputs=False"):
            sharded()(ids, tokens, old_log_probs, advantages, mask, normalizer=count if name == "normalizer" else None)


def case_ddp(rank, world):
    case = Case(torch.float32)
    count = float(case.mask.sum())
    torch.manual_seed(0)
    whole, model = Tied(), Tied()
    model.load_state_dict(whole.state_dict())
    model = DistributedDataParallel(model)
    for other in range(world):
        for micro in batches(case, other, world):
            whole(*micro, normalizer=count).loss.backward()
    first, last = batches(case, rank, world)
    with model.no_sync():
        model(*first, normalizer=count, loss_scale=float(world)).loss.backward()
    model(*last, normalizer=count, loss_scale=float(world)).loss.backward()
    for ours, expected in zip(model.parameters(), whole.parameters(), strict=True):
        assert_close(ours.grad, expected.grad, rtol=1e-4, atol=1e-6)
