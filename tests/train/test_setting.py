"""Declared settings: help, names and errors all follow from the declaration, in any dataclass."""

from dataclasses import dataclass

import pytest

from epo_kernels.train.config import TrainConfig, differences, load_config, to_yaml
from epo_kernels.train.config.tree import all_settings
from epo_kernels.train.setting import (
    ConfigError,
    at_least,
    check_settings,
    group,
    members,
    one_of,
    require,
    setting,
)


@dataclass
class Inner:
    """Inner settings. More about them."""

    rate: float = setting(0.5, "a rate", at_least(0))


@dataclass
class Options:
    """Options of an extension."""

    kind: str = setting("a", "a kind", one_of("alpha", "beta", "a"))
    names: list[str] = setting(["x"], "some names", one_of("x", "y"))
    limit: int | None = setting(None, "a limit", at_least(1))
    inner: Inner = group(Inner, resume="free")

    def check(self) -> None:
        require(self.limit is None or self.inner.rate > 0, "env.options.inner.rate must be positive with a limit")


def test_a_declaration_says_everything():
    by_name = {member.name: member for member in members(Options)}
    assert list(by_name) == ["kind", "names", "limit", "inner"]
    assert (by_name["kind"].help, by_name["kind"].rule.choices) == ("a kind", ("alpha", "beta", "a"))
    assert (by_name["inner"].help, by_name["inner"].is_group) == ("Inner settings. More about them.", True)
    assert by_name["inner"].resume == "free"


def test_instances_share_no_default():
    first, second = Options(), Options()
    first.names.append("y")
    first.inner.rate = 2.0
    assert (second.names, second.inner.rate) == (["x"], 0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            Options(kind="alpa"),
            r"^env\.options\.kind must be one of alpha, beta, a, got 'alpa'; did you mean 'alpha'\?$",
        ),
        (Options(names=["x", "z"]), r"^env\.options\.names must be one of x, y, got 'z'"),
        (Options(limit=0), r"^env\.options\.limit must be at least 1 or null, got 0$"),
        (Options(inner=Inner(float("nan"))), r"^env\.options\.inner\.rate must be at least 0, got nan$"),
        (Options(limit=1, inner=Inner(0.0)), r"^env\.options\.inner\.rate must be positive with a limit$"),
    ],
)
def test_rules_and_checks_name_the_setting(options, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(options, "env.options.")


def test_what_is_allowed_passes():
    check_settings(Options(kind="beta", names=[], limit=3), "env.options.")


def test_every_setting_of_the_driver_has_one_line_of_help():
    for name, member in all_settings().items():
        assert len(member.help) > 5, name
        assert "\n" not in member.help, name


def test_a_resume_follows_the_declaration_of_setting_and_group():
    saved = to_yaml(load_config("practice", []))
    free = ["tracking.wandb_name=mine", "rollout.vllm.sleep=false", "steps=3"]
    assert set(differences(saved, load_config("practice", free))) <= {"schedule_steps"}
    changed = differences(saved, load_config("practice", ["rollout.history=2", "model.threads=2"]))
    assert set(changed) == {"rollout.history", "model.threads"}


def test_the_defaults_pass_their_own_checks():
    config = TrainConfig()
    config.model.name_or_path = "org/model"
    check_settings(config)
