"""No test contacts W&B's servers, and each starts with fresh settings."""

import os

import pytest

os.environ["WANDB_BASE_URL"] = "http://127.0.0.1:9"  # where nothing listens


@pytest.fixture(autouse=True)
def fresh():
    import wandb

    yield
    wandb.teardown()  # it reads the environment once a process
