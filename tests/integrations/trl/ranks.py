"""What two processes make of a run, for test_ranks.py: `torchrun ranks.py MODEL OUTPUT`."""

import json
import sys
from pathlib import Path

import torch
from trl import GRPOTrainer

from epo_kernels.integrations.trl import EPOTrainer
from tests.integrations.trl.pairs import make


def main(model, output):
    torch.set_num_threads(1)
    common = {"optim": "sgd", "learning_rate": 0.1, "gradient_accumulation_steps": 2, "steps_per_generation": 4}
    theirs = make(model, output, GRPOTrainer, **common)
    theirs.train()
    off = make(model, output, EPOTrainer, entropy_coef=0.0, **common)
    off.train()
    on = make(
        model,
        output,
        EPOTrainer,
        entropy_coef=0.1,
        band_high=1.0,
        penalty_alpha=5.0,
        history_weighting="token",
        **common,
    )
    on.train()
    pair = []
    controls = {"use_adaptive_entropy": True, "entropy_target": 4.0, "top_entropy_quantile": 0.5, "max_steps": 2}
    controls |= {"importance_sampling_level": "sequence", "loss_type": "grpo", "off_policy_mask_threshold": 0.01}
    for kind, own in ((GRPOTrainer, {}), (EPOTrainer, {"penalty": "none"})):
        pair.append(make(model, output, kind, entropy_coef=0.1, **common, **controls, **own))
        pair[-1].train()
    weights = [trainer.model.lm_head.weight.detach() for trainer in (theirs, off, on)]
    report = {
        "off_by": float((weights[0] - weights[1]).abs().max()),
        "controls_off_by": float((pair[0].model.lm_head.weight - pair[1].model.lm_head.weight).abs().max()),
        "coefficients": [trainer.entropy_coef for trainer in pair],
        "entropies": [trainer._last_world_entropy for trainer in pair],
        "moved": float((weights[0] - weights[2]).abs().max()),
        "sum": float(weights[2].double().sum()),
        "total": on.history.state_dict()["total"][:, 0].tolist(),
        "steps": len(on.history),
        "tokens": on.state.num_input_tokens_seen,
        "penalty": [entry["epo/penalty"] for entry in on.state.log_history if "epo/penalty" in entry],
    }
    Path(output, f"rank{on.accelerator.process_index}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
