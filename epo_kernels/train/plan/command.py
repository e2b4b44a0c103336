"""The command line of `--plan`, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from epo_kernels.train.config import ConfigError, TrainConfig
from epo_kernels.train.plan.advice import largest_micro_batch, refusal
from epo_kernels.train.plan.memory import RESERVE, ROLLOUT, Machine, MemoryPlan
from epo_kernels.train.plan.work import Work

ASSUMED_GB = 80.0


@dataclass(frozen=True)
class PlanOptions:
    machine: Machine
    teraflops: float | None  # of a GPU, sustained


def take_options(words: Sequence[str]) -> tuple[PlanOptions, list[str]]:
    """The options of `--plan`, and all other words.

    Raises:
        ConfigError: an option without a number.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--gpu-memory", type=float)
    parser.add_argument("--gpu-tflops", type=float)
    try:
        given, rest = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; write --plan --gpus 8 --gpu-memory 80") from error
    has_gpu = torch.cuda.is_available()
    gpus = given.gpus if given.gpus is not None else (torch.cuda.device_count() if has_gpu else 1)
    memory = given.gpu_memory
    if memory is None:
        memory = torch.cuda.get_device_properties(0).total_memory / 1e9 if has_gpu else ASSUMED_GB
    if given.gpu_tflops is not None and given.gpu_tflops <= 0:
        raise ConfigError(f"--gpu-tflops must be positive, got {given.gpu_tflops:g}")
    return PlanOptions(Machine(gpus, memory * 1e9), given.gpu_tflops), rest


def describe(config: TrainConfig, options: PlanOptions) -> tuple[str, str | None]:
    """The plan as text, and why it doesn't fit (None: it does).

    Raises:
        ConfigError: the model's architecture isn't known here, or can't be counted.
    """
    plan = MemoryPlan(config, options.machine)
    lines = [_title(plan), "", *_table(plan), "", *_notes(plan), *_work(plan, options.teraflops)]
    return "\n".join(lines) + "\n", refusal(plan)


def _title(plan: MemoryPlan) -> str:
    machine, model = plan.machine, plan.config.model
    sharding = "FSDP2" if plan.shards > 1 else "not sharded"
    return (
        f"{model.name_or_path}: {plan.parameters.all.total:,} parameters, {plan.parameters.trained.total:,} trained; "
        f"{machine.gpus} x {machine.memory / 1e9:g} GB, {sharding}"
    )


def _table(plan: MemoryPlan) -> list[str]:
    phases, totals = plan.phases(), plan.totals()
    unit, name_of_unit = (1e9, "GB") if max(totals.values()) >= 1e9 else (1e6, "MB")
    names = dict.fromkeys(name for parts in phases.values() for name, size in parts.items() if size)

    def line(name: str, sizes: Iterable[float | None]) -> str:
        cells = (f"{size / unit:.2f}" if size else "" for size in sizes)
        return (f"{name:<16}" + "".join(f"{cell:>16}" for cell in cells)).rstrip()

    return [
        f"{name_of_unit + ' per GPU':<16}" + "".join(f"{phase:>16}" for phase in phases),
        *(line(name, (parts.get(name) for parts in phases.values())) for name in names),
        line("total", totals.values()),
        line("usable", [plan.machine.usable] * len(phases)),
    ]


def _notes(plan: MemoryPlan) -> list[str]:
    config = plan.config
    checkpointing = "with" if config.model.gradient_checkpointing else "without"
    most = largest_micro_batch(plan)
    lines = [
        "GB: 10^9 bytes",
        f"usable: all but {RESERVE:.0%}, which is an allowance for CUDA, NCCL and the allocator, not a count",
        f"micro-batch: {plan.rows} rows of {plan.row_width:,} tokens, {checkpointing} gradient checkpointing; the "
        f"largest that fits: {f'optim.micro_batch_tokens={most}' if most else 'none'}",
    ]
    if config.rollout.engine == "vllm":
        share = plan.phases()[ROLLOUT]["vLLM"]
        room = share - plan.vllm_needs() + plan.kv_of_a_sequence()
        lines.append(
            f"vLLM: {share / 1e9:.1f} GB hold its weights and {max(int(room / plan.kv_of_a_sequence()), 0)} sequences "
            f"of {plan.row_width:,} tokens, less its workspace"
        )
    return lines


def _work(plan: MemoryPlan, teraflops: float | None) -> list[str]:
    work, gpus = Work.of(plan.config, plan.parameters), plan.machine.gpus
    lines = [
        f"a step at most: {work.episodes} episodes of {work.turns} turns, {work.tokens:,} tokens; per GPU "
        f"{work.scoring / gpus:.2e} operations to score them and {work.update / gpus:.2e} to update (bound: prompts "
        "and responses as long as allowed, none shared)"
    ]
    if teraflops:
        seconds = (work.scoring + work.update) / (gpus * teraflops * 1e12)
        lines.append(
            f"at {teraflops:g} TFLOP/s per GPU, as given: {seconds:,.0f} s for scoring and updates, "
            f"{work.tokens / seconds:,.0f} tokens/s; the rollout is not included"
        )
    else:
        lines.append("speed: unknown; --gpu-tflops with the TFLOP/s your GPU sustains gives tokens per second")
    return lines
