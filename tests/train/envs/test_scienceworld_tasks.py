"""All 30 task types of the real ScienceWorld: their panels, and gold episodes of kinds not played elsewhere."""

import pytest

pytest.importorskip("scienceworld", reason="the scienceworld extra isn't installed")

from epo_kernels.train.envs import EnvConfig, Task, make_suite
from epo_kernels.train.envs.scienceworld.environment import TASK_NAMES
from epo_kernels.train.envs.scienceworld.options import ScienceWorldOptions

HELD_OUT = ("boil", "chemistry-mix", "find-animal", "power-component", "use-thermometer")
LISTED = [name for name in TASK_NAMES if name not in HELD_OUT]


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    suite = make_suite(EnvConfig(options=ScienceWorldOptions(LISTED, list(HELD_OUT)), cache_dir=cache))
    yield suite
    suite.close()


@pytest.mark.scienceworld
def test_every_task_type_has_its_panels(suite):
    train, iid, ood = (suite.tasks(split) for split in ("train", "iid", "ood"))
    assert [task.name for task in train[:25]] == LISTED == [task.name for task in iid[:25]]
    assert [task.name for task in ood[:5]] == list(HELD_OUT), "task types that training never sees"
    assert len({*train, *iid, *ood}) == len(train) + len(iid) + len(ood)
    assert set(suite._variations) == set(TASK_NAMES)
    for name, (seen, unseen) in suite._variations.items():
        assert sorted([*seen, *unseen]) == list(range(len(seen) + len(unseen))), name
        assert len(seen) >= len(unseen) / 2 > 0, name
    assert [len(part) for part in suite._variations["boil"]] == [14, 7 + 9], "train; dev and test"
    assert [len(part) for part in suite._variations["find-living-thing"]] == [150, 75 + 75]


@pytest.mark.scienceworld
@pytest.mark.parametrize("name", ["chemistry-mix", "power-component", "use-thermometer"])
def test_a_gold_episode_of_an_unseen_variation(suite, name):
    unseen = next(task for task in suite.tasks("ood") if task.name == name)
    assert suite.demonstrate(unseen).score == 100
    assert suite.demonstrate(Task(name, unseen.variation)).task == unseen


def test_a_name_nearly_right_is_told():
    with pytest.raises(ValueError, match="did you mean 'lifespan-longest-lived'"):
        make_suite(EnvConfig(options=ScienceWorldOptions(task_names=["lifespan-longest-living"])))
    with pytest.raises(ValueError, match="none of easy, noElectricalAction"):
        make_suite(EnvConfig(options=ScienceWorldOptions(simplification="easy,teleport")))


def test_a_panel_without_held_out_task_types_is_refused():
    with pytest.raises(ValueError, match=r"name its held-out task types in env\.options\.ood_task_names"):
        make_suite(EnvConfig()).tasks("ood")
