"""The formulas of bench/communication.py against the collectives that a learner and a critic issue."""

import pytest

from bench.communication import GATHER, REDUCE, SCATTER, Traffic, recorded, table, traffic_of
from bench.memory_plan import BFLOAT16, KL, MODELS, PPO, ROWS, TINY, Case, config_of, saved
from epo_kernels.train.plan.memory import Machine, MemoryPlan

ROUNDS = 2
OBJECTS = 20_000  # bytes of scores and sums that travel as objects, and of gradient norms


def formula(case):
    with saved(MODELS[case.model]) as folder:
        plan = MemoryPlan(config_of(case, folder), Machine(case.gpus, 80e9))
        parameters = plan.parameters
    critic = parameters.all.whole - parameters.outside_decoder if plan.has_critic else 0
    itemsize = 2 if BFLOAT16 in case.settings else 4
    frozen = 4 * parameters.all.split - (4 - itemsize) * parameters.linear.split if plan.has_reference else 0
    layer = 4 * parameters.layer
    traffic = Traffic(
        split=parameters.all.split,
        whole=parameters.trained.whole,
        critic_whole=critic,
        frozen_bytes=frozen,
        layers=parameters.layers,
        scoring_rounds=ROUNDS,
        update_rounds=ROUNDS,
        updates=1,
        critic_rounds=ROUNDS,
        critic_updates=1,
        to_vllm=True,
    )
    return traffic, layer * (2 if plan.has_critic else 1)


@pytest.mark.parametrize("gpus", [2, 8])
@pytest.mark.parametrize("settings", [(), (KL, PPO), (KL, BFLOAT16)], ids=" ".join)
def test_the_formulas_give_the_bytes_that_are_recorded(settings, gpus):
    case = Case(TINY, settings, gpus=gpus)
    found = recorded(case, ROUNDS * ROWS)
    traffic, one_layer = formula(case)
    # In the first backward pass after passes without gradient, FSDP2 prefetches one layer more than it uses.
    assert 0 <= found.bytes[GATHER] - traffic.gathers()[1] - one_layer < OBJECTS
    assert found.bytes[SCATTER] == traffic.scatters()[1]
    assert found.calls[SCATTER] == traffic.scatters()[0]
    assert 0 <= found.bytes[REDUCE] - traffic.reduces() < OBJECTS


def test_more_gpus_share_the_micro_batches_of_an_update_until_each_has_one():
    traffic = {gpus: traffic_of("scienceworld_ppo_7b", gpus) for gpus in (2, 8, 64)}
    per_update = [one.update_rounds / one.updates for one in traffic.values()]
    assert per_update == [16, 4, 1]  # 64 samples, two rows to a micro-batch
    assert traffic[2].reduces() == traffic[64].reduces()
    # 60 updates of the policy, and 30 of the critic with twice the samples
    assert traffic[8].scatters()[1] / traffic[64].scatters()[1] == pytest.approx((60 * 4 + 30 * 8) / (60 + 30))


def test_the_time_of_the_ring_model():
    traffic = Traffic(1000, 0, 0, 0, 1, 0, 1, 0, 0, 0, False)
    assert traffic.sent(4) == 0.75 * (2 * 4000 + 4000)
    assert traffic.seconds(4, bandwidth=1000.0, latency=0.0) == 9.0
    assert traffic.seconds(4, bandwidth=1e30, latency=1.0) == 3 * 3


def test_the_table_has_a_line_for_each_number_of_gpus():
    lines = table("alfworld_grpo_3b", 450, 50, 10).splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:]] == ["2", "4", "8", "16", "32", "64"]
