"""The paper's presets: the published figures, as --print-config shows them, and a source for every line."""

import re
from importlib.resources import files

import pytest
import yaml

from epo_kernels.train.__main__ import main
from epo_kernels.train.config import load_config, preset_titles

COMMON = {
    "loss.entropy_coeff": 1e-3,
    "loss.kl_coeff": 0.01,
    "loss.kl_type": "k3",
    "loss.penalty": "hinge",
    "loss.band_low": 0.0,
    "loss.band_high": 2.0,
    "loss.phase_schedule": "paper",
    "optim.warmup_ratio": 0.1,
    "optim.min_lr_ratio": 0.2,
    "rollout.max_prompt_tokens": 6144,
    "rollout.max_response_tokens": 512,
    "rollout.response_format": "think_action",
    "rollout.history": 2,
    "algorithm.invalid_action_penalty": 0.1,
}
SCIENCEWORLD = {
    "env.name": "scienceworld",
    "model.name_or_path": "Qwen/Qwen2.5-7B-Instruct",
    "steps": 125,
    "env.max_turns": 30,
    "loss.penalty_alpha": 0.05,
}
ALFWORLD = {
    "env.name": "alfworld",
    "model.name_or_path": "Qwen/Qwen2.5-3B-Instruct",
    "steps": 150,
    "env.max_turns": 50,
    "loss.penalty_alpha": 0.1,
    "optim.lr": 5e-6,
    "optim.minibatch_size": 256,
}
PPO = {"algorithm.name": "ppo", "algorithm.gae": "published", "algorithm.groups": 128, "algorithm.group_size": 1}
GRPO = {"algorithm.name": "grpo", "algorithm.group_over": "turns", "algorithm.groups": 16, "algorithm.group_size": 8}
PUBLISHED = {
    "scienceworld_ppo_7b": {**SCIENCEWORLD, **PPO, "optim.lr": 3e-6, "critic.lr": 3e-6, "optim.minibatch_size": 64},
    "scienceworld_grpo_7b": {**SCIENCEWORLD, **GRPO, "optim.lr": 5e-6, "optim.minibatch_size": 128},
    "alfworld_ppo_3b": {**ALFWORLD, **PPO, "critic.lr": 5e-6},
    "alfworld_grpo_3b": {**ALFWORLD, **GRPO},
}
PAPER_PRESETS = list(PUBLISHED)


def printed(capsys, *arguments):
    assert main([*arguments, "--print-config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def at(tree, name):
    for part in name.split("."):
        tree = tree[part]
    return tree


@pytest.mark.parametrize("preset", PAPER_PRESETS)
def test_the_published_figures(capsys, preset):
    shown = printed(capsys, preset)
    wanted = {**COMMON, **PUBLISHED[preset]}
    assert {name: at(shown, name) for name in wanted} == wanted
    episodes = shown["algorithm"]["groups"] * shown["algorithm"]["group_size"]
    assert episodes == 16 * 8 == shown["rollout"]["environments"]


@pytest.mark.parametrize("preset", PAPER_PRESETS)
def test_epo_can_be_switched_off_as_its_head_tells(capsys, preset):
    shown = printed(capsys, preset, "loss.penalty=none")["loss"]
    assert (shown["penalty"], shown["entropy_coeff"]) == ("none", 1e-3)
    published = ["loss.penalty=indicator", "loss.phase_schedule=official", "loss.phase_horizon=150"]
    assert printed(capsys, preset, *published, "loss.history_includes_current=true")["loss"]["phase_horizon"] == 150
    text = source_of(preset)
    assert all(setting in text for setting in published)


@pytest.mark.parametrize("preset", PAPER_PRESETS)
def test_every_line_has_its_source(preset):
    settings = [line for line in source_of(preset).splitlines() if re.match(r"\s*\w+: \S", line)]
    for line in settings:
        if not line.startswith(("run_dir:", "  name: scienceworld", "  name: alfworld")):
            assert re.search(r"  # (launch|script|verl|paper|code|ours|its authors)", line), line
    assert len(settings) > 40


def test_the_prompt_limit_that_crashed_is_warned_of(capsys):
    assert load_config("scienceworld_ppo_7b", []).rollout.warnings() == []
    (warning,) = load_config("scienceworld_ppo_7b", ["rollout.max_prompt_tokens=2048"]).rollout.warnings()
    assert "2048" in warning
    assert "rollout.max_prompt_tokens=6144" in warning
    assert load_config("practice", []).rollout.warnings() == []


def test_help_names_presets_groups_and_settings(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, title in preset_titles().items():
        assert re.search(rf"^  {name} +{re.escape(title)}$", shown, re.MULTILINE)
        assert title.endswith(".")
    for group in (
        "env",
        "env.options",
        "model",
        "model.warm_start",
        "rollout",
        "algorithm",
        "critic",
        "loss",
        "optim",
    ):
        assert re.search(rf"^{re.escape(group)}: \S.{{20,}}$", shown, re.MULTILINE), group
    assert "algorithm.gae=turn" in shown


def source_of(preset):
    return (files("epo_kernels.train") / "presets" / f"{preset}.yaml").read_text(encoding="utf-8")
