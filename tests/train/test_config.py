import re
import subprocess
import sys

import pytest

import epo_kernels as ek
from epo_kernels.train.__main__ import main
from epo_kernels.train.config import (
    ConfigError,
    describe_settings,
    differences,
    epo_config,
    flatten,
    load_config,
    only_rounding,
    option_as_setting,
    preset_names,
    to_yaml,
)


def test_a_preset_and_settings_over_it():
    config = load_config("practice", ["optim.lr=3e-4", "env.options.task_names=[walk]", "loss.clip_ratio_c=null"])
    assert (config.env.name, config.optim.lr, config.loss.clip_ratio_c) == ("practice", 3e-4, None)
    assert config.env.options.task_names == ["walk"]


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
        (["steps"], ["'steps' is not a setting", "steps=10"]),
        (["steps=[1"], ["'steps=[1' cannot be parsed"]),
        (["env.name=scienceword"], ["did you mean 'scienceworld'"]),
        (["algorithm.group_size=1"], ["algorithm.group_size must be at least 2", "algorithm.name=grpo", "got 1"]),
        (
            ["rollout.cohorts=9", "rollout.environments=4"],
            ["rollout.cohorts must be at most", "rollout.environments (4)", "got 9"],
        ),
        (["loss.band_low=3"], ["loss.band_low and loss.band_high", "3"]),
        (["loss.penalty=hinge", "loss.entropy_coeff=0"], ["loss.entropy_coeff=0", "Set loss.penalty=none"]),
        (["loss.entropy_target=1", "loss.entropy_rule=pid"], ["loss.entropy_rule must be one of step, pi, boxed"]),
        (["loss.entropy_target=1", "loss.entropy_kp=-1"], ["loss.entropy_kp must be finite and at least 0, got -1"]),
        (
            ["loss.entropy_target=1", "loss.entropy_target_high=0.5"],
            ["loss.entropy_target_high must be at least loss.entropy_target=1.0, got 0.5"],
        ),
        (
            ["loss.entropy_target=1", "loss.entropy_coeff=2"],
            ["loss.entropy_coeff must be in [loss.entropy_coeff_min, loss.entropy_coeff_max] = [0.0, 1.0], got 2.0"],
        ),
        (["algorithm.shape=aepo"], ["algorithm.shape must be one of none, repo, aem, empg"]),
        (["algorithm.shape=repo"], ["algorithm.shape_coeff must be a number with algorithm.shape=repo"]),
        (["algorithm.shape_clarity_weight=inf"], ["algorithm.shape_clarity_weight must be finite, got inf"]),
        (["loss.clip_ratio_low=2"], ["loss.clip_ratio_low must be", "got 2"]),
        (["rollout.temperature=0"], ["rollout.temperature must be"]),
        (["model.warm_start.demonstrations=0"], ["model.warm_start.demonstrations must be at least 1"]),
        (
            ["rollout.response_format=think_action"],
            ["rollout.response_format must be plain", "model.warm_start.demonstrations=0"],
        ),
        (
            ["rollout.goal_last=true", "rollout.layout=episode"],
            ["rollout.goal_last must be false", "rollout.layout=turn"],
        ),
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


def test_a_target_moves_a_coefficient_that_starts_at_zero():
    config = load_config("practice", ["loss.penalty=hinge", "loss.entropy_coeff=0", "loss.entropy_target=0.3"])
    controller = config.loss.controller()
    assert (controller.rule, controller.target, controller.initial) == ("step", 0.3, 0.0)
    assert load_config("practice", []).loss.controller() is None


def test_sources_that_are_not_there(tmp_path):
    with pytest.raises(ConfigError, match="no preset 'quickstar'; did you mean 'quickstart'"):
        load_config("quickstar", [])
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read: No such file"):
        load_config(str(tmp_path / "missing.yaml"), [])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="must contain settings"):
        load_config(str(tmp_path / "list.yaml"), [])


def test_options_and_spaces_are_answered_with_the_setting(capsys):
    assert main(["practice", "--steps", "5", "seed=1"]) == 2
    wanted = "error: unknown option --steps; settings are written without dashes and spaces: steps=5\n"
    assert capsys.readouterr().err == wanted
    for given, wanted in [
        (["--steps", "5"], "steps=5"),
        (["--steps=5"], "steps=5"),
        (["--optim.lr", "1e-4"], "optim.lr=1e-4"),
        (["--max-turns", "3"], "env.max_turns=3"),
        (["--seed", "-3"], "seed=-3"),
        (["--run-dir", "--dry-run"], "run_dir=VALUE"),
    ]:
        assert option_as_setting(given[0], given[1:]).endswith(f"without dashes and spaces: {wanted}")
    assert "model is a group of settings, written GROUP.KEY=VALUE: model.name_or_path," in option_as_setting(
        "--model", ["gpt2"]
    )
    with pytest.raises(ConfigError, match="steps is a setting; write steps=VALUE, without spaces"):
        load_config(["steps", "5"], [])


def test_a_file_starts_from_a_preset_of_its_own_or_of_the_command_line(tmp_path):
    own, bare = tmp_path / "own.yaml", tmp_path / "bare.yaml"
    own.write_text("preset: practice\nsteps: 7\noptim: {epochs: 3}\n")
    bare.write_text("steps: 7\noptim: {epochs: 3}\n")
    wanted = load_config("practice", ["steps=7", "optim.epochs=3", "seed=4"])
    for sources in (str(own), ["practice", str(bare)], [str(bare), "practice"], ["practice", str(own)]):
        assert load_config(sources, ["seed=4"]) == wanted
    assert load_config([str(own), str(bare)], ["seed=4"]) == wanted
    with pytest.raises(ConfigError, match=r"one preset, got quickstart \(the command line\) and practice \(.*own"):
        load_config(["quickstart", str(own)], [])


def test_a_leading_tilde_is_the_home_folder_in_every_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("preset: practice\nrun_dir: ~/runs/a\nmodel: {name_or_path: ~/models/m}\n")
    config = load_config("~/my.yaml", ["env.cache_dir=~/cache", "resume=~/runs"])
    assert config.run_dir == f"{tmp_path}/runs/a"
    assert config.model.name_or_path == f"{tmp_path}/models/m"
    assert config.env.cache_dir == f"{tmp_path}/cache"
    assert config.resume == f"{tmp_path}/runs"
    assert load_config("practice", ["run_dir=a~b/~"]).run_dir == "a~b/~"
    with pytest.raises(ConfigError, match="run_dir=~no_one_here/a: ~no_one_here has no home folder"):
        load_config("practice", ["run_dir=~no_one_here/a"])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_unicode_with_its_mark_is_read(tmp_path, encoding):
    (tmp_path / "my.yaml").write_bytes("preset: practice\r\nrun_dir: café\r\n".encode(encoding))
    assert load_config(str(tmp_path / "my.yaml"), []).run_dir == "café"


MISTAKES = {
    "a key twice": ("steps: 3\noptim:\n  lr: 1e-4\n  lr: 2e-4\n", 4, "optim.lr is given twice, first in line 3"),
    "a group twice": ("optim: {lr: 1}\noptim: {epochs: 1}\n", 2, "optim is given twice, first in line 1"),
    "a tab": ("optim:\n\tlr: 1e-4\n", 2, "a tab; indent YAML with spaces: 'lr: 1e-4'"),
    "a tab later": ("optim:\n  lr: 1e-4\n\tepochs: 2\n", 3, "a tab; indent YAML with spaces: 'epochs: 2'"),
    "latin-1": (
        "seed: 1\nrun_dir: café\n".encode("latin-1"),
        2,
        "not UTF-8; save the file as UTF-8: run_dir: caf\\xe9",
    ),
    "UTF-16 without a mark": ("seed: 1\n".encode("utf-16-le"), 1, "UTF-16 without a byte-order mark"),
    "a control character": ("run_dir: a\x07\n", 1, "character 7 is not allowed"),
    "an unset variable": (
        "run_dir: ${oc.env:EPO_UNSET}/a\n",
        1,
        "run_dir: the environment variable EPO_UNSET is not set; set it, or write ${oc.env:EPO_UNSET,DEFAULT}",
    ),
    "a variable of another type": ("seed: 1\nsteps: ${oc.env:PATH}\n", 2, "steps: While dereferencing"),
    "an open interpolation": ("seed: 1\nrun_dir: ${oc.env:PATH\n", 2, "missing BRACE_CLOSE"),
    "an unknown resolver": ("run_dir: ${env:PATH}\n", 1, "run_dir: Unsupported interpolation type env"),
    "an unknown reference": ("run_dir: a/${sed}\n", 1, "run_dir: Interpolation key 'sed' not found"),
    "a flat key": (
        "seed: 1\noptim.lr: 1e-4\n",
        2,
        "write optim: {lr: ...}",
    ),
    "a flat key within a group": ("model:\n  warm_start.lr: 1\n", 2, "write model: {warm_start: {lr: ...}}"),
    "a group as a flat key": ("model.warm_start: {lr: 1}\n", 1, "write model: {warm_start: ...}"),
    "an unset variable as preset": (
        "preset: ${oc.env:EPO_UNSET}\n",
        1,
        "the environment variable EPO_UNSET is not set",
    ),
    "a value out of range": ("seed: 1\noptim:\n  lr: -1\n", 3, "optim.lr must be positive and finite, got -1"),
    "settings that exclude each other": ("loss: {band_low: 3}\n", 1, "loss.band_low and loss.band_high must"),
    "an unknown choice": ("seed: 1\nenv: {name: alfword}\n", 2, "did you mean 'alfworld'?"),
    "an unknown group": ("wandb: off\n", 1, "did you mean 'tracking.wandb'? In a file: tracking: {wandb: ...}"),
    "a group that is off": ("seed: 1\ntracking: off\n", 2, "tracking is a group of settings (wandb, "),
    "a choice that is off": (
        "tracking:\n  wandb: off\n",
        2,
        "tracking.wandb must be one of disabled, online, offline, got false",
    ),
    "a text that is no": (
        "tracking: {wandb_name: no}\n",
        1,
        "tracking.wandb_name must be text, quoted if necessary, got",
    ),
    "a group without its settings": ("optim:\nlr: 1\n", 1, "got nothing: indent them under it"),
    "settings of a setting": ("run_dir:\n  a: 1\n", 1, "run_dir is a setting, not a group: it has no 'a'"),
    "a wrong type": ("seed: 1\noptim:\n  lr: fast\n", 3, "optim.lr: Value 'fast'"),
    "a value that is null": ("run_dir: ~\n", 1, "run_dir: must have a value, got null"),
    "a key that YAML reads as true": ("on: 1\n", 1, "'on' cannot be the name of a setting"),
    "an open bracket": ("seed: 1\nevaluate:\n  panels: [iid\nsteps: 2\n", 3, "panels: [iid"),
    "an open quote": ('run_dir: "a\nseed: 1\n', 1, "run_dir: "),
    "two documents": ("seed: 1\n---\nseed: 2\n", 2, "expected a single document"),
    "a tag": ("seed: 1\nrun_dir: !!python/object:os.system a\n", 2, "could not determine a constructor"),
    "an unknown preset": ("seed: 1\npreset: quickstar\n", 2, "did you mean 'quickstart'?"),
    "a preset that is off": ("preset: off\n", 1, "preset must be one of"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_file_is_told_with_file_line_and_key(tmp_path, monkeypatch, mistake):
    text, line, words = MISTAKES[mistake]
    (tmp_path / "my.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EPO_UNSET", raising=False)
    with pytest.raises(ConfigError) as caught:
        load_config("my.yaml", ["model.name_or_path=m"])
    message = str(caught.value)
    assert message.startswith(f"my.yaml, line {line}: ")
    assert words in message
    assert "\n" not in message


def test_interpolations_see_the_whole_configuration(tmp_path, monkeypatch):
    monkeypatch.setenv("EPO_STEPS", "9")
    (tmp_path / "my.yaml").write_text("preset: practice\nsteps: ${oc.env:EPO_STEPS}\nrun_dir: runs/seed${seed}\n")
    config = load_config(str(tmp_path / "my.yaml"), ["seed=3"])
    assert (config.steps, config.run_dir) == (9, "runs/seed3")
    with pytest.raises(ConfigError, match=r"^run_dir: the environment variable EPO_UNSET is not set"):
        load_config("practice", ["run_dir=${oc.env:EPO_UNSET}"])


def test_help_shows_values_as_yaml_has_them():
    described = describe_settings()
    for shown in ("model.fsdp=true ", "rollout.goal_last=false ", "env.max_turns=null ", "evaluate.panels=[iid] "):
        assert f"  {shown}" in described
    assert not re.search(r"\b(None|True|False)\b", described)


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
        "env.options.demonstrator=novice",
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
        (["practice", "quickstart"], "a run starts from one preset, got practice"),
        (["--print"], "unknown option --print; the options are --print-config, --dry-run, --plan and --help"),
    ],
)
def test_the_command_line_ends_with_2(arguments, words):
    command = [sys.executable, "-m", "epo_kernels.train", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert ended.stdout == ""
