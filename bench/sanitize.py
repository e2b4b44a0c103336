"""Small calls of every fused backend: `compute-sanitizer --tool memcheck python -m bench.sanitize`.

Sizes are on both sides of the plans' thresholds: one tile, several tiles, rows on chip, clusters, odd ends.
"""

from __future__ import annotations

import argparse
import sys
import time

import torch

import epo_kernels as ek
from bench.cases import DTYPES

ROWS = (2, 3)
WIDTHS = (1, 1_000, 32_000, 50_257, 128_256, 151_936, 262_144)


def call_everything(backend: str, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """The whole loss, and statistics with both gradients; one row is masked.

    Raises:
        RuntimeError: a result is not finite.
    """
    generator = torch.Generator(device).manual_seed(width)
    logits = torch.randn(*ROWS, width, generator=generator, device=device).to(dtype).requires_grad_()
    tokens = torch.randint(width, ROWS, generator=generator, device=device)
    mask = torch.ones(ROWS, dtype=torch.bool, device=device)
    mask[0, 1] = False
    values = torch.randn(3, *ROWS, generator=generator, device=device)
    cfg = ek.EPOConfig(penalty="hinge", kl_coeff=0.01)
    out = ek.epo_loss(
        logits,
        tokens,
        values[0] - 5.0,
        values[1],
        mask,
        cfg,
        entropy_bounds=(values[2], values[2] + 1.0),
        ref_log_probs=values[0] - 5.0,
        backend=backend,
    )
    (of_loss,) = torch.autograd.grad(out.loss, logits)
    log_probs, entropy = ek.log_probs_and_entropy(logits, tokens, mask=mask, backend=backend)
    assert entropy is not None
    (of_statistics,) = torch.autograd.grad((log_probs * values[0] + entropy * values[1]).sum(), logits)
    if not all(bool(result.isfinite().all()) for result in (out.loss, of_loss, of_statistics)):
        raise RuntimeError(f"backend={backend!r}, {width} wide, {dtype}: a result is not finite")


def main() -> int:
    """0, or 1 if a call raised or no fused backend is available."""
    parser = argparse.ArgumentParser(prog="python -m bench.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=60.0, help="time limit, after which sizes are skipped")
    options = parser.parse_args()
    device, began, failures = torch.device(options.device), time.monotonic(), 0
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    backends = [name for name in names if ek.available_backends().get(name, "not there") is None]
    for width in WIDTHS:
        for name in backends:
            for dtype in DTYPES.values() if width == 1_000 else (torch.bfloat16,):
                if time.monotonic() - began > options.seconds:
                    print(f"skipped for time: {name}, {width}, {dtype}")
                    continue
                try:
                    call_everything(name, width, dtype, device)
                    print(f"ok: {name}, {width}, {dtype}")
                except RuntimeError as error:
                    failures += 1
                    print(f"failed: {error}")
    if not backends:
        print(f"no fused backend runs on {device}: {ek.available_backends()}")
    return int(failures > 0 or not backends)


if __name__ == "__main__":
    sys.exit(main())
