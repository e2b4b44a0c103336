"""With EPO off, the loss, its gradients and its metrics are TRL's own; with a bonus alone, too."""

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import epo_kernels as ek
from epo_kernels.integrations.trl import LOSS_TYPES
from tests.integrations.trl.pairs import assert_same, both, loss_and_gradients, make, micro_batch


def compare(folder, tmp_path, inputs, accumulated=1, trainer=None, tolerances=None, **changes):
    theirs, ours = both(folder, tmp_path, trainer=trainer, **changes)
    expected = loss_and_gradients(theirs, inputs, accumulated)
    assert any(bool(g.abs().max() > 1e-4) for g in expected[1].values()), "a gradient to compare"
    assert_same(loss_and_gradients(ours, inputs, accumulated), expected, **(tolerances or {}))
    return theirs, ours


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_every_loss_type(folder, tmp_path, loss_type, beta):
    inputs = micro_batch(ref=beta != 0, tools=True)
    compare(folder, tmp_path, inputs, accumulated=3, loss_type=loss_type, beta=beta, temperature=0.7)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_bonus_alone_is_trls(folder, tmp_path, loss_type, beta):
    inputs = micro_batch(ref=beta != 0)
    epo_off = {"penalty": "none"}
    compare(folder, tmp_path, inputs, accumulated=2, loss_type=loss_type, beta=beta, entropy_coef=0.5, epo=epo_off)


@pytest.mark.parametrize(
    "changes",
    [
        {"beta": 0.3, "use_bias_correction_kl": False},
        {"beta": 0.3, "use_bias_correction_kl": False, "loss_type": "grpo"},
        {"epsilon": 0.1, "epsilon_high": 0.3},
        {"delta": 1.5},
        {"gradient_accumulation_steps": 2, "steps_per_generation": 4},
        {"gradient_checkpointing": True},
        {"cast_lm_head_to_fp32": True},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_settings(folder, tmp_path, changes):
    compare(folder, tmp_path, micro_batch(ref="beta" in changes), accumulated=2, **changes)


def test_on_policy(folder, tmp_path):
    compare(folder, tmp_path, micro_batch(old=False, ref=True), beta=0.3)


def test_advantages_a_token(folder, tmp_path):
    compare(folder, tmp_path, micro_batch() | {"advantages": torch.randn(4, 9)})


def test_nothing_counts(folder, tmp_path):
    theirs, ours = both(folder, tmp_path)
    inputs = micro_batch()
    inputs["tool_mask"] = torch.zeros_like(inputs["completion_mask"])
    assert_same(loss_and_gradients(ours, inputs), loss_and_gradients(theirs, inputs))


@pytest.mark.parametrize("garbage", [float("nan"), -1e4])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_masked_tokens_are_never_read(folder, tmp_path, garbage, beta):
    """What a tool wrote may be as unlikely as it likes."""
    trainer = make(folder, tmp_path, beta=beta)
    inputs = micro_batch(tools=True, ref=True)
    expected = loss_and_gradients(trainer, inputs)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        inputs[name] = torch.where(mask, inputs[name], garbage)
    assert_same(loss_and_gradients(trainer, inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 9), (4, 1)], ids=["token", "sequence"])
def test_importance_weights_of_a_rollout_engine(folder, tmp_path, shape):
    theirs, ours = both(folder, tmp_path)
    theirs.use_vllm = ours.use_vllm = True  # what the loss asks; nothing is generated here
    inputs = micro_batch() | {"importance_sampling_ratio": torch.rand(shape) * 2}
    assert_same(loss_and_gradients(ours, inputs), loss_and_gradients(theirs, inputs))


def test_evaluation(folder, tmp_path):
    theirs, ours = both(folder, tmp_path)
    inputs = micro_batch()
    losses = []
    for trainer in (theirs, ours):
        trainer.model.eval()
        with torch.no_grad():
            losses.append(trainer._compute_loss(trainer.model, inputs))
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-5, atol=2e-6)


def test_bfloat16_autocast(folder, tmp_path):
    tolerances = {"rtol": 5e-3, "atol": 2e-3}  # a rounding of the logits to bfloat16 apart
    theirs, ours = both(folder, tmp_path, bf16=True)
    expected, found = (loss_and_gradients(trainer, micro_batch()) for trainer in (theirs, ours))
    assert_same((*found[:2], {}), (*expected[:2], {}), **tolerances)


def test_lora(folder, tmp_path):
    adapters = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    _, ours = compare(folder, tmp_path, micro_batch(ref=True), beta=0.3, trainer=adapters)
    assert all("lora" in name for name, p in ours.model.named_parameters() if p.requires_grad)


SIZES = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "initializer_range": 0.2,
}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0)),
        (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=2.5)),
        (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25)),
    ],
    ids=["softcap", "divisor", "scale"],
)
def test_logit_transforms(folder, tmp_path, model_class, config):
    torch.manual_seed(1)
    model_class(config).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "model")
    _, ours = compare(str(tmp_path / "model"), tmp_path, micro_batch(), temperature=0.8)
    assert (ours._logit_softcap, ours._logit_scale) in ((3.0, None), (None, 0.4), (None, 0.25))


@pytest.mark.parametrize("coefficient", [None, 0.5, 0.0])
def test_mixtures_of_experts(folder, tmp_path, coefficient):
    config = Qwen3MoeConfig(**SIZES, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    torch.manual_seed(1)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path / "model")
    changes = {"router_aux_loss_coef": coefficient}
    _, ours = compare(str(tmp_path / "model"), tmp_path, micro_batch(), accumulated=2, **changes)
    assert ours.aux_loss_enabled == (coefficient != 0.0)
    make(str(tmp_path / "model"), tmp_path, max_steps=1, **changes).train()


class Largest(TorchDispatchMode):
    """The most rows of the vocabulary's width that any tensor has had, the head's transposed weight (D, V) aside."""

    def __init__(self, weight):
        super().__init__()
        (self.width, self.hidden_size), self.rows = weight.shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.dim() and value.shape[-1] == self.width:
                rows = value.numel() // self.width
                self.rows = max(self.rows, rows if rows != self.hidden_size else 0)
        return result


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_logits_never_exist(folder, tmp_path, monkeypatch, beta):
    trainer = make(folder, tmp_path, beta=beta)
    inputs = micro_batch(ref=True)
    count, width = int(inputs["completion_mask"].sum()), trainer.model.config.vocab_size
    calls = []
    trainer.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    chunk = 2 * width * 4
    for name in ("linear_epo_loss", "linear_log_probs_and_entropy"):
        whole = getattr(ek, name)
        monkeypatch.setattr(ek, name, lambda *a, whole=whole, **k: whole(*a, max_chunk_bytes=chunk, **k))
    with Largest(trainer.model.lm_head.weight) as largest:
        loss_and_gradients(trainer, inputs)
    assert calls == []
    assert 0 < largest.rows <= 2 < count
