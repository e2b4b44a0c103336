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
    weights = [trainer.model.lm_head.weight.detach() for trainer in (theirs, off, on)]
    report = {
        "off_by": float((weights[0] - weights[1]).abs().max()),
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
