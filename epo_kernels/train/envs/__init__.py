"""Environments: what the agent acts in, behind one small interface."""

from epo_kernels.train.envs.base import (
    SPLITS,
    Demonstration,
    EnvConfig,
    Environment,
    EnvironmentFailure,
    Observation,
    PracticeConfig,
    StepResult,
    Suite,
    Task,
)

__all__ = [
    "SPLITS",
    "Demonstration",
    "EnvConfig",
    "Environment",
    "EnvironmentFailure",
    "Observation",
    "PracticeConfig",
    "StepResult",
    "Suite",
    "Task",
    "make_suite",
]


def make_suite(config: EnvConfig) -> Suite:
    """The suite that `config.name` asks for. Nothing heavy starts before its first task or environment.

    Raises:
        ValueError: an unknown suite, task type or simplification, or a setting out of range.
    """
    if config.max_turns is not None and config.max_turns < 1:
        raise ValueError(f"env.max_turns must be at least 1, not {config.max_turns}")
    if config.step_timeout <= 0 or config.start_timeout <= 0:
        raise ValueError(
            f"env.step_timeout and env.start_timeout are seconds above 0, not {config.step_timeout} and "
            f"{config.start_timeout}"
        )
    # Imported on demand: ScienceWorld's Python package is an extra that practice doesn't need.
    if config.name == "practice":
        from epo_kernels.train.envs.practice import PracticeSuite

        return PracticeSuite(config)
    if config.name == "scienceworld":
        from epo_kernels.train.envs.scienceworld.suite import ScienceWorldSuite

        return ScienceWorldSuite(config)
    if config.name == "alfworld":
        from epo_kernels.train.envs.alfworld.suite import ALFWorldSuite

        return ALFWorldSuite(config)
    raise ValueError(f"env.name must be 'scienceworld', 'alfworld' or 'practice', not {config.name!r}")
