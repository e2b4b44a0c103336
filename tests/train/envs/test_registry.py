"""Environments from outside the package: found by name, with their own settings and panels, and trained."""

import json
import re
import subprocess
import sys
import textwrap
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import pytest

from epo_kernels.train.__main__ import main
from epo_kernels.train.config import ConfigError, differences, load_config, to_yaml
from epo_kernels.train.envs import EnvConfig, make_suite
from epo_kernels.train.envs.registry import BUILT_IN, suite_class

COUNTING = """
from dataclasses import dataclass

from epo_kernels.train.envs import Demonstration, Environment, Observation, StepResult, Suite, Task, play
from epo_kernels.train.setting import ConfigError, at_least, setting


@dataclass
class Options:
    '''How far to count.'''

    goal: int = setting(2, "the last number", at_least(1))
    words: list[str] = setting(["zero", "one", "two", "three"], "what numbers are called")
    tolerant: bool = setting(False, "accept figures as well", resume="free")

    def check(self):
        if self.goal >= len(self.words):
            raise ConfigError(f"env.options.goal must be below the {len(self.words)} words, got {self.goal}")


class Counting(Environment):
    def __init__(self, options):
        self.options = options

    def reset(self, task):
        self.number = task.variation
        return self.seen()

    def step(self, action):
        valid = action == self.options.words[self.number + 1]
        self.number += valid
        won = self.number == self.options.goal
        return StepResult(self.seen(), float(won), won, 100.0 * won, won, valid)

    def seen(self):
        return Observation(f"Count to {self.options.goal}.", self.options.words[self.number])


class CountingSuite(Suite):
    Options = Options
    panels = ("near", "far")
    default_max_turns = 5

    def tasks(self, split):
        return [Task(split, start) for start in {"train": [0, 1], "near": [1], "far": [0]}[split]]

    def make(self):
        return Counting(self.config.options)

    def demonstrate(self, task):
        with self.borrow() as environment:
            options = self.config.options
            return play(environment, task, options.words[task.variation + 1 : options.goal + 1])[0]


class Taskless(Suite):
    def make(self):
        return None


class Loose(Suite):
    Options = dict
    tasks = make = None


class Nameless(Suite):
    panels = ("iid", "a/b")
    tasks = make = None
"""
NAME = "env.name=counting:CountingSuite"
SMALL = [
    "practice",
    NAME,
    "steps=2",
    "model.warm_start.demonstrations=2",
    "model.warm_start.epochs=20",
    "rollout.environments=4",
    "algorithm.groups=2",
    "algorithm.group_size=2",
    "evaluate.episodes=2",
    "evaluate.panels=[near,far]",
    "optim.minibatches=1",
]


@pytest.fixture(autouse=True)
def modules(tmp_path, monkeypatch):
    """User modules in the folder, unloaded afterwards."""
    folder = tmp_path / "modules"
    folder.mkdir()
    (folder / "counting.py").write_text(COUNTING)
    monkeypatch.syspath_prepend(str(folder))
    before = set(sys.modules)
    yield folder
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(folder)):
            del sys.modules[name]


def test_a_plug_in_is_trained_evaluated_and_resumed(tmp_path, capsys):
    run = [*SMALL, f"run_dir={tmp_path}/run", "env.options.goal=3"]
    assert main(run) == 0
    records = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {(record["panel"], record["when"]) for record in records} == {
        (panel, when) for panel in ("near", "far") for when in ("before", "after")
    }
    assert main([*run, "steps=3", "env.options.tolerant=true"]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["training/global_step"] for step in steps] == [1, 2, 3]
    assert main([*run, "steps=4", "env.options.goal=2"]) == 2
    assert re.search(r"env\.options\.goal +3 +2", capsys.readouterr().err)


def test_a_split_without_tasks_is_refused(tmp_path, modules, capsys):
    (modules / "empty.py").write_text(COUNTING.replace('"far": [0]', '"far": []'))
    assert main([*SMALL, "env.name=empty:CountingSuite", f"run_dir={tmp_path}/run"]) == 2
    assert "has no tasks in its split 'far'" in capsys.readouterr().err


def test_python_m_finds_a_module_of_the_current_folder(modules):
    arguments = ["practice", NAME, "--print-config"]
    environment = {"PYTHONPATH": str(Path(__file__).parents[3]), "PATH": "/usr/bin"}
    command = [sys.executable, "-m", "epo_kernels.train", *arguments]
    shown = subprocess.run(command, cwd=modules, env=environment, capture_output=True, text=True, timeout=120)
    assert "panels:\n  - near\n" in shown.stdout, shown.stderr


def test_options_and_panels_are_those_of_the_suite(tmp_path):
    config = load_config("practice", [NAME, "env.options.words=[a,b,c]"])
    assert (config.env.options.goal, config.env.options.words) == (2, ["a", "b", "c"])
    assert config.evaluate.panels == ["near"], "the suite's first panel"
    (tmp_path / "my.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "my.yaml"), []) == config
    changed = load_config("practice", [NAME, "env.options.words=[a,b,c,d]", "env.options.tolerant=true"])
    assert differences(to_yaml(config), changed) == {"env.options.words": (["a", "b", "c"], ["a", "b", "c", "d"])}


def test_options_of_a_preset_or_file_leave_with_its_environment(tmp_path):
    (tmp_path / "walk.yaml").write_text("preset: practice\nenv: {name: practice, options: {length: 3}}\n")
    assert load_config(str(tmp_path / "walk.yaml"), []).env.options.length == 3
    assert load_config(str(tmp_path / "walk.yaml"), ["env.options.goal=1", NAME]).env.options.goal == 1
    (tmp_path / "bare.yaml").write_text("env: {options: {goal: 1}}\n")
    assert load_config(str(tmp_path / "bare.yaml"), [NAME, "model.warm_start.demonstrations=1"]).env.options.goal == 1


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("options: {gaol: 3}", 3, "unknown setting 'env.options.gaol'; did you mean 'env.options.goal'?"),
        ("options: {goal: far}", 3, "env.options.goal: Value 'far' of type 'str' could not be converted to Integer"),
        ("options: {words: one}", 3, "env.options.words"),
        ("options: {goal: 0}", 3, "env.options.goal must be at least 1, got 0"),
        ("options: {goal: 9}", 3, "env.options.goal must be below the 4 words, got 9"),
        ("options: 3", 3, "env.options is a group of settings (goal, words, tolerant), got the value 3"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, text, line, message):
    (tmp_path / "my.yaml").write_text(f"env:\n  name: counting:CountingSuite\n  {text}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(["practice", str(tmp_path / "my.yaml")], [])
    assert str(caught.value).startswith(f"{tmp_path}/my.yaml, line {line}: {message}")


def test_panels_and_lists_of_actions_are_checked_against_the_suite():
    with pytest.raises(ConfigError, match=r"evaluate\.panels must be one of near, far, got 'iid'"):
        load_config("practice", [NAME, "evaluate.panels=[iid]"])
    with pytest.raises(ConfigError, match=r"rollout\.admissible_actions must be false with env\.name=counting"):
        load_config("practice", [NAME, "rollout.admissible_actions=true"])


def test_help_shows_the_options_of_all_built_in_environments_or_of_the_one_named(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for setting in ("jvm_memory=256m", "admissible_commands=true", "temptation=0.5"):
        assert f"  env.options.{setting} " in shown
    assert main([NAME, "--help"]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^env\.options: How far to count\.\n  env\.options\.goal=2 +the last number\n", shown, re.M)
    assert re.search(r"^  evaluate\.panels=\[near\] .*\(near \| far\)$", shown, re.MULTILINE)
    assert "jvm_memory" not in shown
    assert main(["env.name=counting:Suit", "--help"]) == 2
    assert "has no 'Suit'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("parctice", "alfworld, practice, scienceworld, or a plug-in's my_module:MySuite.*did you mean 'practice'"),
        ("counting", "got 'counting'"),
        ("cuonting:CountingSuite", f"no module 'cuonting'.*current folder, {Path.cwd()}"),
        ("counting.inner:CountingSuite", "no module 'counting.inner'"),
        ("counting:CountingSiute", "the module counting has no 'CountingSiute'"),
        ("counting:Counting", "derived from epo_kernels.train.envs.Suite that defines make, tasks"),
        ("counting:Taskless", "it does not define tasks"),
        ("counting:Loose", "its Options must be a dataclass"),
        ("counting:Nameless", r"panels must be .*got \('iid', 'a/b'\)"),
        ("needy:Suite", r"the module needy needs no_such_package, which is not installed: pip install no_such_package"),
        ("broken:Suite", r"importing broken raised ZeroDivisionError: .*broken\.py, line 2\)"),
        ("garbled:Suite", r"importing garbled raised SyntaxError: .*garbled\.py, line 1"),
        ("slippery:Suite", r"importing slippery raised AttributeError: .*slippery\.py, line 3\)"),
    ],
)
def test_names_that_lead_nowhere_are_explained(modules, name, message):
    (modules / "needy.py").write_text("import no_such_package.part\n")
    (modules / "broken.py").write_text("one = 1\none / 0\n")
    (modules / "garbled.py").write_text("def\n")
    (modules / "slippery.py").write_text("import json\n\njson.dupms\n")
    with pytest.raises((ValueError, ImportError), match=message):
        suite_class(name)
    with pytest.raises(ConfigError, match=message):
        load_config("practice", [f"env.name={name}"])


def test_an_entry_point_of_an_installed_package_serves_as_well(monkeypatch):
    point = EntryPoint("counting", "counting:CountingSuite", "epo_kernels.environments")
    monkeypatch.setattr("epo_kernels.train.envs.registry.entry_points", lambda group: EntryPoints([point]))
    assert make_suite(EnvConfig(name="counting")).name == "counting"
    with pytest.raises(ValueError, match="alfworld, counting, practice, scienceworld"):
        suite_class("conuting")


def test_built_in_environments_need_no_package_to_be_configured(tmp_path):
    program = textwrap.dedent("""
        import sys
        sys.modules |= {"scienceworld": None, "alfworld": None, "textworld": None, "py4j": None}
        from epo_kernels.train.config import load_config
        for name in sys.argv[1:]:
            load_config("practice", [f"env.name={name}"])
    """)
    subprocess.run([sys.executable, "-c", program, *BUILT_IN], check=True, timeout=120)
