"""Compile every variant of the Triton kernels for chips that aren't here, and read what the assembler made of them.

    python -m tests.backends.ahead_of_time [80 90 100 120]

prints a line of JSON a variant: its name, registers, stack bytes (spills), shared memory, and whether its accesses are
16 bytes wide. Needs neither a GPU nor nvcc: Triton brings an assembler and cuobjdump.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton as triton_package
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from epo_kernels.backends import triton, triton_kernels
from epo_kernels.declaration import COEFFICIENTS

CHIPS = {  # A100, H200, B200, RTX PRO 6000
    80: triton.Chip(108, 40 << 20),
    90: triton.Chip(132, 50 << 20),
    100: triton.Chip(148, 126 << 20),
    120: triton.Chip(188, 128 << 20),
}
ITEM_SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
KERNELS = {
    "loss": "row_loss_kernel",
    "statistics": "row_statistics_kernel",
    "spread": "row_spread_kernel",
    "gradient": "row_gradient_kernel",
    "weights": "token_weights_kernel",
    "scale": "scale_kernel",
    "cast": "scale_kernel",
}
OPTIONAL = ("old_log_probs", "ref_log_probs", "is_weights", "lowers", "uppers", "temperatures", "scale", "softcap")
SELDOM = ("temperatures", "scale", "softcap")
TYPES = {"tokens": "*i64", "mask": "*u8", "partials": "*fp64", "sums_out": "*fp64", "ticket": "*i32", "extras": "*fp64"}


class Variant(NamedTuple):
    kernel: str
    dtype: str = "bf16"
    width: int = 151_936
    aligned: bool = True
    absent: tuple[str, ...] = SELDOM  # arguments that are None
    unit_stride: bool = True
    padded: bool = False
    policy_loss: str = "ppo"
    penalty: str = "hinge"
    kl_type: str = "k3"
    mode: str = "token-mean"  # of the weights


def variants() -> Iterator[Variant]:
    """Each way of taking rows in each dtype; then, one by one, the optional features."""
    widths = (4_096, 32_000, 151_936)
    for dtype, aligned, width in product(("bf16", "fp32"), (True, False), widths):
        yield Variant("loss", dtype, width, aligned)
    for kernel, dtype, aligned in product(("statistics", "spread", "gradient"), ("bf16", "fp32"), (True, False)):
        yield Variant(kernel, dtype, 151_936, aligned)
    for kernel, width in (("loss", 4_096), ("loss", 151_936), ("statistics", 151_936), ("gradient", 151_936)):
        # A float16 loss with a gradient goes through statistics.
        yield Variant(kernel, "fp16", width, absent=(*SELDOM, "out") if kernel == "loss" else SELDOM)
        yield Variant(kernel, "bf16", width, absent=())
        yield Variant(kernel, "bf16", width, padded=True)
        yield Variant(kernel, "bf16", width, aligned=False, unit_stride=False, absent=OPTIONAL)
    for width in (4_096, 151_936):
        yield Variant("loss", "bf16", width, absent=(*OPTIONAL, "out"))
        for penalty in ("none", "quadratic", "indicator", "gate"):
            yield Variant("loss", "bf16", width, penalty=penalty)
        for kl_type in ("k1", "k2", "abs"):
            yield Variant("loss", "bf16", width, kl_type=kl_type)
        for policy_loss in ("cispo", "sapo", "dppo_kl"):  # the others do less
            yield Variant("loss", "bf16", width, policy_loss=policy_loss)
    yield Variant("statistics", absent=(*OPTIONAL, "entropies"))
    yield Variant("gradient", absent=(*OPTIONAL, "entropies", "grad_entropies"))
    yield Variant("spread", "fp16")
    yield Variant("spread", aligned=False, unit_stride=False, padded=True, absent=())
    for mode in ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"):
        yield Variant("weights", mode=mode)
    for dtype in ("bf16", "fp32"):
        yield Variant("scale", dtype)
    yield Variant("cast")  # float32 to the dtype


def compile_variant(variant: Variant, capability: int) -> dict[str, Any]:
    """The assembler's report on one variant."""
    rows = variant.kernel in ("loss", "statistics", "spread", "gradient")
    kernel = getattr(triton_kernels, KERNELS[variant.kernel])
    options: dict[str, Any] = {"num_warps": 4 if variant.kernel == "weights" else 8}
    constants: dict[str, Any] = {
        "BLOCK": 4096, "SEQUENCES": 1, "TOKENS": triton.WEIGHTS_TILE, "MODE": variant.mode, "NORMALIZED": False,
        "UNIT_STRIDE": variant.unit_stride, "PADDED": variant.padded, "IN_PLACE": variant.kernel == "scale",
        "POLICY_LOSS": variant.policy_loss, "PENALTY": variant.penalty, "KL_TYPE": variant.kl_type,
        "lengths": None, "sequence_ids": None, "normalizer_ptr": None,
    }  # fmt: skip
    if rows:
        size = ITEM_SIZES[variant.dtype]
        heavy = variant.padded or "softcap" not in variant.absent
        plan = triton.launch_plan(variant.kernel, variant.width, size, variant.aligned, heavy, CHIPS[capability])
        options = {"num_warps": plan.warps, "maxnreg": triton.REGISTERS}
        constants |= {"DEPTH": plan.depth, "LANES": plan.lanes, "VECTOR": plan.vector, "STAGES": plan.stages}
        constants["ONE_TILE"] = plan.one_tile
    constants |= dict.fromkeys(variant.absent)
    if variant.unit_stride:
        constants |= {"logits_v": 1, "out_v": 1, "gradient_v": 1}

    names = list(inspect.signature(kernel.fn).parameters)
    signature = {name: "constexpr" if name in constants else _type(name, variant) for name in names}
    divisible = {"width", *(name + end for name in ("logits", "out", "gradient") for end in ("", "_b", "_t"))}
    aligned = divisible if variant.aligned else set()
    source = ASTSource(
        kernel,
        signature,
        constexprs={(i,): constants[name] for i, name in enumerate(names) if name in constants},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in aligned},
    )
    compiled = triton_package.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    return {
        "variant": "-".join(str(part) for part in variant),
        "capability": capability,
        **_resources(compiled.asm["cubin"]),
        "shared": compiled.metadata.shared,
        "threads": 32 * compiled.metadata.num_warps,
        "aligned": variant.kernel != "weights" and variant.aligned,
        "writes": "out" in names and "out" not in variant.absent,
        "wide_loads": bool(re.search(r"cp\.async\.cg\.shared\.global|ld\.global[^;]*v4\.", ptx)),
        "wide_stores": bool(re.search(r"st\.global[^;]*v4\.", ptx)),
    }


def _type(name: str, variant: Variant) -> str | tuple[str, ...]:
    if name == "gradient" and variant.kernel == "cast":
        return "*fp32"
    if name in ("logits", "out", "gradient"):
        return f"*{variant.dtype}"
    if name in TYPES:
        return TYPES[name]
    sizes = ("rows", "length", "width", "vocab_size", "batch", "num_sequences")
    if name in sizes or name.endswith(("_b", "_t", "_v")):
        return "i32"
    if name in ("numbers", "pointers"):
        return ("fp32" if name == "numbers" else "*fp32",) * len(COEFFICIENTS)
    numbers = ("temperature", "scale", "softcap", "normalizer", "loss_scale", "max_length")
    return "fp32" if name in numbers else "*fp32"


def _resources(cubin: bytes) -> dict[str, int]:
    tool = Path(triton_package.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    assert found is not None, told
    return {"registers": int(found[1]), "stack": int(found[2])}


def main(capabilities: list[int]) -> None:
    for capability, variant in product(capabilities, variants()):
        sys.stdout.write(json.dumps(compile_variant(variant, capability)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or list(CHIPS))
