"""How it comes in: verl imports it by its environment variable, and nothing of verl comes in by itself."""

import os
import subprocess
import sys

import pytest


def run(code, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VERL_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def test_verl_imports_it_in_any_process():
    code = """
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.engine_workers import ActorRolloutRefWorker
print(get_policy_loss_fn("epo").__module__, ActorRolloutRefWorker.actor_worker_cls.__name__)
"""
    with_it = run(code, VERL_USE_EXTERNAL_MODULES="epo_kernels.integrations.verl")
    assert with_it.stdout.split() == ["epo_kernels.integrations.verl", "EPOTrainingWorker"], with_it.stderr
    without = run(code)
    assert "Unsupported loss mode: epo" in without.stderr


def test_the_library_alone_imports_nothing_of_verl():
    code = "import sys, epo_kernels; print(sorted({'verl', 'ray', 'transformers'} & {*sys.modules}))"
    assert run(code).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.modules['verl'] = None", "import of verl halted"),
        ("import verl; verl.__version__ = '0.8.2'", "this is verl 0.8.2"),
        ("import verl.workers.utils.losses as losses; del losses.ppo_loss", "cannot import name 'ppo_loss'"),
    ],
)
def test_a_verl_that_is_missing_or_too_old_gives_the_install_line(code, reason):
    result = run(f"{code}\nimport epo_kernels.integrations.verl")
    assert "ImportError: epo_kernels.integrations.verl needs verl 0.9 (" in result.stderr
    assert reason in result.stderr
    assert "Install: pip install 'epo-kernels[verl]'" in result.stderr
