"""`--plan`: its counts against real steps, the paper's presets, and what it says where something doesn't fit."""

import gc
import json
import re
from dataclasses import replace

import pytest
import torch

from bench.memory_plan import BFLOAT16, CASES, PAPER, SMALL, TINY, measured, planned
from epo_kernels.train.__main__ import main
from epo_kernels.train.config import ConfigError, ModelConfig, load_config
from epo_kernels.train.envs import make_suite
from epo_kernels.train.plan.activations import LiveBytes
from epo_kernels.train.plan.advice import largest_micro_batch, refusal
from epo_kernels.train.plan.architecture import Parameters, architecture_of
from epo_kernels.train.plan.memory import CRITIC, POLICY, ROLLOUT, Machine, MemoryPlan
from epo_kernels.train.plan.work import Work
from tests.train.models import save_model

# Two sizes, each kind of setting once; `python -m bench.memory_plan` measures all cases, a third size among them.
QUICK = [
    *(case for case in CASES if case.model == TINY),
    *(
        case
        for case in CASES
        if case.model == SMALL and (case.of_critic or case.gpus == 2 or BFLOAT16 in case.settings)
    ),
]


@pytest.mark.parametrize("case", QUICK, ids=lambda case: f"{case.model[:12]}-{case.gpus}-{case.name}")
def test_the_plan_is_within_15_percent_of_a_real_step(case):
    assert planned(case) == pytest.approx(measured(case), rel=0.15)


def test_live_bytes_count_storages_once_and_until_they_are_freed():
    before = torch.zeros(1000)
    gc.collect()
    with LiveBytes([before]) as counted:
        first = torch.ones(250)
        view = first.view(5, 50).t()
        before.add_(1)
        assert counted.live == 1000
        del first
        assert counted.live == 1000
        second = view * 2
        assert counted.live == 2000
        del view
        assert counted.live == 1000
    assert counted.peak == 2000
    assert second.shape == (50, 5)


# As the models' cards on the Hub give them, in billions.
@pytest.mark.parametrize(("name", "total", "without_embedding"), [("7B", 7.61, 6.53), ("3B", 3.09, 2.77)])
def test_known_models_have_their_published_number_of_parameters(name, total, without_embedding):
    model = ModelConfig(name_or_path=f"Qwen/Qwen2.5-{name}-Instruct")
    parameters = Parameters.of(architecture_of(model), model)
    assert parameters.all.total / 1e9 == pytest.approx(total, abs=0.01)
    assert parameters.all.split / 1e9 == pytest.approx(without_embedding, abs=0.01)


def plan_of(*settings, preset="scienceworld_ppo_7b", gpus=8, memory=80e9):
    return MemoryPlan(load_config(preset, settings), Machine(gpus, memory))


@pytest.mark.parametrize("preset", PAPER)
def test_the_paper_presets_fit_eight_gpus_of_80_gb(preset):
    assert refusal(plan_of(preset=preset)) is None


def test_the_largest_micro_batch_is_the_last_that_fits():
    plan = plan_of()
    largest = largest_micro_batch(plan)
    updates = {POLICY, CRITIC}
    for rows, fits in ((largest // plan.row_width, True), (largest // plan.row_width + 1, False)):
        totals = plan.totals(rows)
        assert (max(totals[phase] for phase in updates) <= plan.machine.usable) == fits
    reason = refusal(plan_of("optim.micro_batch_tokens=131072"))
    assert f"optim.micro_batch_tokens={largest} or less" in reason
    assert refusal(plan_of(f"optim.micro_batch_tokens={largest}")) is None


def test_a_refusal_names_settings_that_then_fit():
    reason = refusal(plan_of("rollout.vllm.memory_share=0.6"))
    low, high = map(float, re.search(r"memory_share between ([\d.]+) and ([\d.]+)", reason).groups())
    assert refusal(plan_of(f"rollout.vllm.memory_share={high}")) is None
    assert refusal(plan_of(f"rollout.vllm.memory_share={high + 0.01}")) is not None
    assert refusal(plan_of(f"rollout.vllm.memory_share={low}")) is None
    assert "memory_share between" in refusal(plan_of(f"rollout.vllm.memory_share={low - 0.02}"))

    reason = refusal(plan_of(gpus=2))
    assert (gpus := int(re.search(r"--gpus (\d+)", reason).group(1))) == 8
    assert refusal(plan_of(gpus=gpus)) is None

    long = ["model.gradient_checkpointing=false", "optim.micro_batch_tokens=6656"]
    reason = refusal(plan_of(*long, preset="scienceworld_ppo_7b"))
    assert "model.gradient_checkpointing=true" in reason


def test_vllm_that_never_sleeps_counts_in_every_phase():
    asleep, awake = plan_of(), plan_of("rollout.vllm.sleep=false")
    share = 0.3 * 80e9
    for phase, total in asleep.totals().items():
        assert awake.totals()[phase] == pytest.approx(total + (0 if phase == ROLLOUT else share))


def test_replicated_weights_do_not_shrink_with_more_gpus():
    one, many = (plan_of("model.fsdp=false", gpus=gpus)._resident() for gpus in (1, 8))
    assert one == many
    assert plan_of(gpus=8)._resident()["weights"] < 0.3 * one["weights"]


def test_a_folder_is_read_and_needs_no_weights(tmp_path):
    folder = save_model(tmp_path / "model", "qwen3")
    (folder / "model.safetensors").unlink()
    config = load_config("practice", [f"model.name_or_path={folder}", "model.warm_start.demonstrations=0"])
    plan = MemoryPlan(config, Machine(1, 80e9))
    assert plan.parameters.all.total < 100_000
    assert refusal(plan) is None
    assert refusal(replace(plan, machine=Machine(1, 1e4))) is not None


def test_a_folder_that_cannot_be_trained_says_why(tmp_path):
    folder = save_model(tmp_path / "model", "qwen3")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ConfigError, match="quantiz"):
        architecture_of(ModelConfig(name_or_path=str(folder)))


def test_the_most_turns_are_those_of_the_run():
    config = load_config("practice", ["env.options.length=20", "env.options.spare_turns=5"])
    work = Work.of(config, MemoryPlan(config, Machine(1, 80e9)).parameters)
    assert work.turns == make_suite(config.env).max_turns > 20


def test_a_model_that_is_nowhere_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model\.name_or_path=nobody/nothing: .*give a folder with config\.json"):
        architecture_of(ModelConfig(name_or_path="nobody/nothing"))


def test_the_command_line(capsys):
    assert main(["alfworld_grpo_3b", "--plan", "--gpus", "8", "--gpu-memory=80", "--gpu-tflops", "300"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^total +\d", shown, re.MULTILINE)
    assert "tokens/s" in shown
    assert main(["alfworld_grpo_3b", "--plan", "--gpus=2", "--gpu-memory", "24"]) == 2
    told = capsys.readouterr()
    assert "tokens/s" not in told.out
    assert "--gpus" in told.err
    for words in (
        ["--plan", "--gpus", "many"],
        ["--plan", "--gpus", "0"],
        ["--plan", "--gpu-memory", "-1"],
        ["--gpus"],
    ):
        assert main(["practice", *words]) == 2
        assert "error: " in capsys.readouterr().err
