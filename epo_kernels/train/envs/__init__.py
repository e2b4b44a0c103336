"""Environments in which the agent acts, behind one small interface."""

from epo_kernels.train.envs.base import (
    SPLITS,
    Demonstration,
    EnvConfig,
    Environment,
    EnvironmentFailure,
    Observation,
    StepResult,
    Task,
)
from epo_kernels.train.envs.demonstrations import cache_folder, play
from epo_kernels.train.envs.process import ProcessEnvironment
from epo_kernels.train.envs.registry import make_suite
from epo_kernels.train.envs.suite import Suite

__all__ = [
    "SPLITS",
    "Demonstration",
    "EnvConfig",
    "Environment",
    "EnvironmentFailure",
    "Observation",
    "ProcessEnvironment",
    "StepResult",
    "Suite",
    "Task",
    "cache_folder",
    "make_suite",
    "play",
]
