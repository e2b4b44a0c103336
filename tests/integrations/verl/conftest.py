import pytest

from tests.integrations.verl import harness


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A tiny Qwen2 in a folder."""
    return harness.save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session", autouse=True)
def process_group(tmp_path_factory):
    harness.init_process_group(tmp_path_factory.mktemp("store") / "store", rank=0, world_size=1)


@pytest.fixture(scope="session")
def workers(model_path):
    """make(remove_padding=, fused=) -> a real worker whose learning rate is 0, made once."""
    made = {}

    def make(remove_padding=False, fused=None):
        if (remove_padding, fused) not in made:
            made[remove_padding, fused] = harness.make_worker(model_path, remove_padding, fused)
        return made[remove_padding, fused]

    return make
