"""A small generated set of games, shared by the tests of one process."""

import pytest

from epo_kernels.train.envs.alfworld.games import author_games


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alfworld")
    author_games(folder, {"train": 6, "iid": 6, "ood": 6}, seed=3)
    return folder


@pytest.fixture(scope="session", autouse=True)
def use_data(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALFWORLD_DATA", str(data))
        yield
