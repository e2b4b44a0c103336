"""The gate: an implementation is timed only after it has computed correct results on new random inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import Case

PASS = "pass"
# Maximum ‖out - truth‖ / ‖truth‖. float32 is far below (tf32, near 3e-4, is not); a gradient rounded to bfloat16 is off
# by 1e-3; bfloat16 logits of a bfloat16 product change log-probs by about 1e-3 and gradients by 5e-3 to 1e-2.
_EXACT = {"statistics": 1e-4, "gradient": 1e-4}
_TOLERANCES = {
    ("fp32", False): _EXACT,
    ("fp32", True): _EXACT,
    ("bf16", False): {"statistics": 1e-4, "gradient": 4e-3},
    ("bf16", True): {"statistics": 5e-3, "gradient": 2e-2},
    ("fp16", False): {"statistics": 1e-4, "gradient": 1e-3},
    ("fp16", True): {"statistics": 1e-3, "gradient": 5e-3},
}


def tolerance(case: Case, output: str) -> float:
    return _TOLERANCES[case.dtype, case.linear]["gradient" if output.startswith("grad_") else "statistics"]


def error(output: Tensor, truth: Tensor, floor: float = 0.0) -> float:
    """‖output - truth‖ / max(‖truth‖, floor), NaN if the output contains NaN."""
    difference = squares = 0.0
    pairs = zip(output.detach().flatten().split(1 << 26), truth.flatten().split(1 << 26), strict=True)
    for part, true in pairs:  # in parts, because a gradient may exceed the free memory
        difference += (part.double() - true.double()).square().sum().item()
        squares += true.double().square().sum().item()
    return (difference**0.5) / max(squares**0.5, floor, 1e-300)


def check(case: Case, outputs: dict[str, Tensor], truth: dict[str, Tensor]) -> str:
    """ "pass", or a description of the fault: missing outputs, wrong shapes, errors above the tolerance."""
    faults = []
    for name, true in truth.items():
        if name not in outputs:
            faults.append(f"{name} is missing")
            continue
        output = outputs[name]
        if output.shape != true.shape:
            faults.append(f"{name} has shape {tuple(output.shape)}, not {tuple(true.shape)}")
            continue
        # A loss is a mean of terms near 1 that may cancel, so its error is relative to their size.
        off, allowed = error(output, true, floor=1.0 if name == "loss" else 0.0), tolerance(case, name)
        if not off <= allowed:
            faults.append(f"{name} is off by {off:.1e}, at most {allowed:.0e} is allowed")
    return "fails: " + "; ".join(faults) if faults else PASS


def poison(device: torch.device, size: int) -> None:
    """Fill memory that the next allocations are likely to reuse with NaN, to expose unwritten elements."""
    torch.full((size,), float("nan"), device=device)
