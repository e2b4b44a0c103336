"""One rank of two: python -m tests.integrations.verl.rank RANK STORE MODEL OUTPUT."""

import sys

import torch

from tests.integrations.verl import harness

EPO = {
    "penalty": "hinge",
    "penalty_alpha": 2.0,
    "band_low": 0.9,
    "band_high": 1.1,
    "history_weighting": "token",
    "phase_schedule": "constant",
}


def two_updates(worker, mode, tensors):
    """(metrics and gradients of the second update, H̄ of each turn), whose band comes from the first."""
    actor = harness.actor_config(epo=EPO, entropy_coeff=0.3, loss_agg_mode=mode)
    micro_batches = {"micro_batch_size_per_gpu": 1, "use_dynamic_bsz": False}  # two of them a rank
    harness.update(worker, actor, tensors, **micro_batches)
    metrics = harness.update_again(worker, tensors, **micro_batches)
    return metrics, worker.gradients, worker.epo.history.means()


def main(rank, store, model_path, output):
    rank = int(rank)
    harness.init_process_group(store, rank, world_size=2)
    tensors = harness.episodes(first=2 * rank, last=2 * rank + 2)
    worker = harness.make_worker(model_path, remove_padding=True, fused="epo")
    results = {mode: two_updates(worker, mode, tensors) for mode in ("token-mean", "seq-mean-token-mean")}
    torch.save(results, f"{output}.{rank}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
