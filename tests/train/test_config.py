import subprocess
import sys

import pytest

import epo_kernels as ek
from epo_kernels.train.config import (
    ConfigError,
    describe_settings,
    differences,
    epo_config,
    flatten,
    load_config,
    only_rounding,
    preset_names,
    to_yaml,
)


def test_a_preset_and_settings_over_it():
    config = load_config("practice", ["optim.lr=3e-4", "env.task_names=[walk]", "loss.clip_ratio_c=null"])
    assert (config.env.name, config.optim.lr, config.loss.clip_ratio_c) == ("practice", 3e-4, None)
    assert config.env.task_names == ["walk"]


def test_a_file_and_what_is_printed_reads_back(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(to_yaml(load_config("practice", ["seed=7"])))
    assert load_config(str(file), []) == load_config("practice", ["seed=7"])


@pytest.mark.parametrize("preset", preset_names())
def test_every_preset_is_valid(preset):
    assert load_config(preset, []).steps > 0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["optim.lrr=1"], ["unknown setting 'optim.lrr'", "did you mean 'optim.lr'"]),
        (["learning_rate=1"], ["unknown setting 'learning_rate'"]),
        (["kl_coeff=1"], ["did you mean 'loss.kl_coeff'"]),
        (["steps=many"], ["steps", "'many'", "Integer"]),
        (["optim.lr=fast"], ["optim.lr", "'fast'", "Float"]),
        (["optim=3"], ["optim is a group of settings"]),
        (["evaluate.panels=iid"], ["evaluate.panels"]),
        (["steps"], ["'steps' is no setting"]),
        (["steps=[1"], ["'steps=[1' is not to be read"]),
        (["env.name=scienceword"], ["did you mean 'scienceworld'"]),
        (["algorithm.group_size=1"], ["algorithm.group_size must be at least 2, got 1"]),
        (["rollout.cohorts=9", "rollout.environments=4"], ["rollout.cohorts (9)", "rollout.environments (4)"]),
        (["loss.band_low=3"], ["loss.band_low and loss.band_high", "3"]),
        (["loss.penalty=hinge", "loss.entropy_coeff=0"], ["loss.penalty=hinge", "loss.entropy_coeff=0"]),
        (["loss.clip_ratio_low=2"], ["loss.clip_ratio_low must be", "got 2"]),
        (["rollout.temperature=0"], ["rollout.temperature must be"]),
        (["model.warm_start.demonstrations=0"], ["model.warm_start.demonstrations must be at least 1"]),
        (["rollout.response_format=think_action"], ["rollout.response_format=plain"]),
        (["rollout.goal_last=true", "rollout.layout=episode"], ["rollout.goal_last=true needs rollout.layout=turn"]),
        (["evaluate.panels=[ood]", "env.name=scienceworld"], ["env.ood_task_names"]),
        (["checkpoint.keep=0"], ["checkpoint.keep must be at least 1"]),
        (["loss.phase_horizon=0"], ["loss.phase_horizon must be at least 1 or null, got 0"]),
        (["watch.entropy_low=5"], ["watch.entropy_low must be below watch.entropy_high", "5.0 and 4.0"]),
        (["env.max_failures=0"], ["env.max_failures must be at least 1"]),
        (["loss.rollout_is=sequence"], ["loss.rollout_is must be one of auto, none, token, turn, got 'sequence'"]),
        (["loss.rollout_is_cap=0.5"], ["loss.rollout_is_cap must be at least 1, got 0.5"]),
        (["optim.warmup_ratio=1.5"], ["optim.warmup_ratio must be in [0, 1], got 1.5"]),
    ],
)
def test_what_is_wrong_is_named_in_one_line(settings, words):
    with pytest.raises(ConfigError) as caught:
        load_config("practice", settings)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no preset 'quickstar'; did you mean 'quickstart'"):
        load_config("quickstar", [])
    with pytest.raises(ConfigError, match=r"missing\.yaml is not to be read"):
        load_config(str(tmp_path / "missing.yaml"), [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must hold settings"):
        load_config(str(tmp_path / "list.yaml"), [])


def test_loss_settings_are_those_of_the_library():
    config = load_config("practice", ["loss.penalty=gate", "loss.clip_ratio_high=0.3", "rollout.temperature=0.7"])
    assert epo_config(config) == ek.EPOConfig(
        penalty="gate", clip_ratio_high=0.3, entropy_coeff=config.loss.entropy_coeff, temperature=0.7
    )
    assert {f"loss.{name}" for name in ek.EPOConfig.__dataclass_fields__} - {"loss.temperature"} <= set(flatten(config))


def test_differences_name_the_settings_that_count():
    saved = to_yaml(load_config("practice", ["optim.lr=1e-4", "run_dir=a", "checkpoint.every=1"]))
    operational = [
        "run_dir=b",
        "resume=never",
        "checkpoint.every=2",
        "evaluate.episodes=7",
        "evaluate.panels=[]",
        "watch.stop=true",
        "tracking.wandb=online",
        "tracking.wandb_name=mine",
        "env.step_timeout=1",
        "env.start_timeout=1",
        "env.jvm_memory=1g",
        "env.cache_dir=c",
        "env.max_failures=1",
        "optim.max_skipped_updates=1",
    ]
    changed = differences(saved, load_config("practice", ["optim.lr=2e-4", *operational]))
    assert changed == {"optim.lr": (1e-4, 2e-4)}
    assert not only_rounding(changed)


def test_settings_that_only_round_otherwise_are_told_from_the_others():
    saved = to_yaml(load_config("practice", []))
    rounding = [
        "rollout.environments=3",
        "rollout.cohorts=1",
        "optim.micro_batch_tokens=99",
        "model.device=cpu",
        "model.threads=2",
    ]
    changed = differences(saved, load_config("practice", rounding))
    assert [f"{name}={now}" for name, (_, now) in sorted(changed.items())] == sorted(rounding)
    assert only_rounding(changed)


def test_a_setting_newer_than_the_run_had_its_default():
    saved = "\n".join(line for line in to_yaml(load_config("practice", [])).splitlines() if "phase_horizon" not in line)
    assert differences(saved, load_config("practice", [])) == {}
    assert differences(saved, load_config("practice", ["loss.phase_horizon=150"])) == {
        "loss.phase_horizon": (None, 150)
    }
    assert differences(saved + "\nsince_removed: 3\n", load_config("practice", [])) == {"since_removed": (3, None)}


def test_every_setting_is_explained():
    described = describe_settings()
    for name in flatten(load_config("practice", [])):
        line = next(line for line in described.splitlines() if line.strip().startswith(f"{name}="))
        assert len(line.split(None, 1)[-1].strip()) > 5, f"{name} has no explanation"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["practice", "optim.lrr=1"], "error: unknown setting 'optim.lrr'; did you mean 'optim.lr'?\n"),
        (["practice", "quickstart"], "one preset or file at most"),
        (["--print"], "unknown option --print"),
    ],
)
def test_the_command_line_ends_with_2(arguments, words):
    command = [sys.executable, "-m", "epo_kernels.train", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
