"""EPO on several GPUs with FSDP2: `torchrun --nproc-per-node=8 examples/fsdp2.py` (without GPUs: 2 processes of gloo).

The loss is the end of the model's forward: there FSDP has gathered the head, here one tensor with the embedding, and
takes its gradient. Two micro-batches per step, whose gradients leave the ranks once.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import Qwen2Config, Qwen2ForCausalLM

import epo_kernels as ek

STEPS, MICRO_BATCHES, SEQUENCES, LENGTH, TURNS = 3, 2, 4, 32, 4
CFG = replace(ek.EPOConfig.restoring(), entropy_coeff=1e-2)


class WithLoss(nn.Module):
    """A causal model whose forward ends in the loss."""

    def __init__(self, model: Qwen2ForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, advantages: Tensor, mask: Tensor, **keywords) -> ek.EPOOutput:
        hidden = self.model.model(ids).last_hidden_state
        batch = ids.roll(-1, 1), None, advantages, mask
        return ek.linear_epo_loss(hidden, self.model.lm_head.weight, *batch, CFG, **keywords)


def main() -> list[float]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    mesh = init_device_mesh(device, (world,))
    torch.manual_seed(0)  # the same model on every rank
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Qwen2Config(vocab_size=512, num_hidden_layers=2, **sizes, tie_word_embeddings=True)
    model = WithLoss(Qwen2ForCausalLM(config)).to(device)
    # Products run in bfloat16, updates in float32. Inputs must not be cast: rounding old log-probs to bfloat16 moves
    # ratios by up to 3 %, with the same weights.
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in model.model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    history = ek.EntropyHistory(num_turns=TURNS)
    torch.manual_seed(1 + rank)  # dialogues of its own
    losses = []
    for _ in range(STEPS):
        ids = torch.randint(512, (MICRO_BATCHES, SEQUENCES, LENGTH), device=device)
        advantages = torch.randn(MICRO_BATCHES, SEQUENCES, device=device)
        turns = (torch.arange(LENGTH, device=device) * TURNS // LENGTH).expand(SEQUENCES, -1)
        mask = torch.rand(MICRO_BATCHES, SEQUENCES, LENGTH, device=device) < 0.7
        mask[..., -1] = False  # nothing follows it
        tokens = mask.sum().double()
        dist.all_reduce(tokens)  # of all ranks and micro-batches: each loss is its share of the whole batch's
        total = None
        for i in range(MICRO_BATCHES):
            model.set_requires_gradient_sync(i == MICRO_BATCHES - 1)
            out = model(
                ids[i],
                advantages[i],
                mask[i],
                entropy_bounds=history.bounds(turns, low=0.5, high=1.0),
                segment_ids=turns + TURNS * torch.arange(SEQUENCES, device=device)[:, None],
                num_segments=TURNS * SEQUENCES,
                normalizer=tokens,
                loss_scale=float(world),  # FSDP averages gradients over ranks
            )
            out.loss.backward()
            history.update(turns, out.entropy, mask[i])
            total = out.metrics if total is None else total + out.metrics
        optimizer.step()
        optimizer.zero_grad()
        history.commit(group=dist.group.WORLD)
        losses.append(total.all_reduce().to_floats()["loss"] / world)
    if rank == 0:
        print("loss of each step:", *(f"{loss:.4f}" for loss in losses))
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
