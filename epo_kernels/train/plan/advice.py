"""What to change where a plan doesn't fit."""

from __future__ import annotations

import math
from dataclasses import replace

from epo_kernels.train.plan.memory import CRITIC, POLICY, ROLLOUT, MemoryPlan

MOST_GPUS = 1024


def largest_micro_batch(plan: MemoryPlan) -> int:
    """The most tokens of optim.micro_batch_tokens with which all updates fit; 0 where not even one row does."""
    one, two = plan.totals(1), plan.totals(2)
    rows: float = math.inf
    for phase in {POLICY, CRITIC} & one.keys():
        room, growth = plan.machine.usable - one[phase], two[phase] - one[phase]
        rows = min(rows, 1 + room // growth if room >= 0 else 0)
    return int(rows) * plan.row_width


def refusal(plan: MemoryPlan) -> str | None:
    """Which phases don't fit, and the setting to change for each; None where all fit."""
    usable, totals = plan.machine.usable, plan.totals()
    over = [phase for phase, total in totals.items() if total > usable]
    reasons = []
    if plan.states > usable:
        reasons.append(_too_many_states(plan))
    else:
        if {POLICY, CRITIC} & set(over):
            reasons.append(_too_large_update(plan))
        if ROLLOUT in over or _starves_vllm(plan):
            reasons.append(_rollout(plan))
    if not reasons:
        return None
    shown = ", ".join(f"{phase} {totals[phase] / 1e9:.1f} GB" for phase in over) or "vLLM has too little memory"
    return f"does not fit {usable / 1e9:.1f} GB ({shown}): {'; '.join(reasons)}"


def _too_many_states(plan: MemoryPlan) -> str:
    gpus = _enough_gpus(plan)
    more = f"use at least {gpus} GPUs (--gpus {gpus})" if gpus else "choose a smaller model in model.name_or_path"
    if not plan.config.model.lora_rank:
        more += ", or train adapters (model.lora_rank=16)"
    return f"weights, gradients and optimizer states alone are too large; {more}"


def _too_large_update(plan: MemoryPlan) -> str:
    if most := largest_micro_batch(plan):
        return f"set optim.micro_batch_tokens={most} or less"
    model = plan.config.model
    if not model.gradient_checkpointing:
        cheaper = replace(plan, config=replace(plan.config, model=replace(model, gradient_checkpointing=True)))
        if most := largest_micro_batch(cheaper):
            return f"set model.gradient_checkpointing=true, and optim.micro_batch_tokens={most} or less"
    gpus = _enough_gpus(plan)
    more = f"use at least {gpus} GPUs (--gpus {gpus}), or " if gpus else ""
    return (
        f"not even one row of {plan.row_width} tokens fits; {more}lower rollout.max_prompt_tokens and "
        "optim.micro_batch_tokens"
    )


def _starves_vllm(plan: MemoryPlan) -> bool:
    rollout = plan.config.rollout
    return rollout.engine == "vllm" and rollout.vllm.memory_share * plan.machine.memory < plan.vllm_needs()


def _rollout(plan: MemoryPlan) -> str:
    rollout, machine = plan.config.rollout, plan.machine
    parts = plan.phases()[ROLLOUT]
    if rollout.engine == "transformers":
        fits = (machine.usable - sum(parts.values()) + parts["KV cache"]) // (2 * plan.kv_of_a_sequence())
        if fits >= 1:
            return f"set rollout.environments={int(fits)} or less, or rollout.engine=vllm"
        return "set rollout.engine=vllm, which needs no whole float32 weights on each GPU"
    least = plan.vllm_needs() / machine.memory
    most = (machine.usable - sum(parts.values()) + parts["vLLM"]) / machine.memory
    low, high = math.ceil(100 * least) / 100, math.floor(100 * most) / 100
    if low <= high:
        return f"set rollout.vllm.memory_share between {low:.2f} and {high:.2f}"
    gpus = _enough_gpus(plan)
    more = f"use at least {gpus} GPUs (--gpus {gpus})" if gpus else "choose a smaller model in model.name_or_path"
    return f"vLLM needs rollout.vllm.memory_share={low:.2f} and the rest leaves {max(high, 0):.2f}; {more}"


def _enough_gpus(plan: MemoryPlan) -> int | None:
    """The least power of two of GPUs on which one row per micro-batch fits, and vLLM beside the states."""
    gpus = 1
    while gpus <= MOST_GPUS:
        if gpus > plan.machine.gpus and _fits_at_all(replace(plan, machine=replace(plan.machine, gpus=gpus))):
            return gpus
        gpus *= 2
    return None


def _fits_at_all(plan: MemoryPlan) -> bool:
    phases, usable = plan.phases(1), plan.machine.usable
    rollout = phases.pop(ROLLOUT)
    others = sum(size for name, size in rollout.items() if name != "vLLM")
    needed = others + (plan.vllm_needs() if "vLLM" in rollout else 0)
    return needed <= usable and all(sum(parts.values()) <= usable for parts in phases.values())
