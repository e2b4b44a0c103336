"""An `EnvironmentPool` played in lockstep."""

from epo_kernels.train.envs import EnvironmentFailure


def reset_all(pool, tasks):
    """Start an episode in slots 0, 1, ... and wait for all; a failure replaces its observation."""
    return [_outcome(future) for future in [pool.reset(slot, task) for slot, task in enumerate(tasks)]]


def step_all(pool, actions):
    """Play an action in each slot named and wait for all; a failure replaces its result."""
    futures = {slot: pool.step(slot, action) for slot, action in actions.items()}
    return {slot: _outcome(future) for slot, future in futures.items()}


def _outcome(future):
    try:
        return future.result()
    except EnvironmentFailure as failure:
        return failure
