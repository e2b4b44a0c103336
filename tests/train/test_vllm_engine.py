"""The parts of the vLLM engine that need no vLLM. The rest is in tests/integrations/vllm."""

import pytest

from epo_kernels.train.__main__ import main
from epo_kernels.train.config import ConfigError, RolloutConfig, load_config
from epo_kernels.train.rollout import vllm_engine
from epo_kernels.train.rollout.engine import StopRule


def test_without_vllm_the_run_says_how_to_get_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(vllm_engine, "find_spec", lambda name: None)
    vllm_engine.require_vllm(RolloutConfig(engine="transformers"))
    with pytest.raises(ConfigError, match="needs the package vllm; pip install"):
        vllm_engine.require_vllm(RolloutConfig(engine="vllm"))
    assert main(["practice", "rollout.engine=vllm", f"run_dir={tmp_path / 'run'}"]) == 2
    assert "rollout.engine=vllm needs the package vllm" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("setting", ["memory_share=0", "memory_share=1", "cpu_cache_gb=0"])
def test_shares_that_cannot_be(setting):
    with pytest.raises(ConfigError, match=rf"rollout\.vllm\.{setting.partition('=')[0]} must be"):
        load_config("practice", [f"rollout.vllm.{setting}"])


def test_a_response_is_cut_where_it_ends_first(cloned):
    rule = StopRule(cloned.tokenizer, cloned.end_ids, "think_action")
    assert rule.closing_tag == "</action>"
    whole = "<think>left > right</think><action>go left</action>"
    ids = cloned.tokenizer(f"{whole} and more</action>")["input_ids"]
    cut = ids[: rule.length(ids)]
    assert cloned.tokenizer.decode(cut).startswith(whole)
    assert len(cut) < len(ids)
    assert rule.length(cut[:-1]) == len(cut) - 1
    assert rule.length([]) == 0
