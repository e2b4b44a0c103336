"""The loss on heads, adapters and precisions of all kinds; with EPO off it equals TRL's (see test_policies.py)."""

import pytest
import torch
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

import epo_kernels as ek
from tests.integrations.trl.pairs import assert_same, both, loss_and_gradients, make, micro_batch


def compare(folder, tmp_path, inputs, accumulated=1, trainer=None, tolerances=None, **changes):
    theirs, ours = both(folder, tmp_path, trainer=trainer, **changes)
    expected = loss_and_gradients(theirs, inputs, accumulated)
    assert any(bool(g.abs().max() > 1e-4) for g in expected[1].values()), "a gradient to compare"
    assert_same(loss_and_gradients(ours, inputs, accumulated), expected, **(tolerances or {}))
    return theirs, ours


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


def save(path, folder, model):
    """The model in a folder, with the tokenizer of another."""
    model.save_pretrained(path)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(path)
    return str(path)


def assert_scores_and_loss_are_the_models(trainer):
    """Scores are those of the model's own logits, and so is the loss: by these scores every ratio is 1."""
    inputs = micro_batch(old=False)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    model, temperature = trainer.model.train(), trainer.args.temperature
    counted = inputs["completion_mask"].bool()
    with torch.no_grad():
        scores = trainer._get_per_token_logps_and_entropies(model, ids, mask, 9, batch_size=2, compute_entropy=True)
        wanted = (model(ids, attention_mask=mask).logits[:, -10:-1] / temperature).log_softmax(-1)
    found = wanted.gather(-1, inputs["completion_ids"][..., None])[..., 0], -(wanted.exp() * wanted).sum(-1)
    for score, expected in zip(scores, found, strict=False):
        torch.testing.assert_close(score[counted], expected[counted], rtol=1e-5, atol=1e-5)
    on_policy = loss_and_gradients(trainer, inputs)
    assert_same(loss_and_gradients(trainer, inputs | {"old_per_token_logps": scores[0]}), on_policy)


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0)),
        (RecurrentGemmaForCausalLM, RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, lru_width=32)),
        (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=2.5)),
        (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25)),
        (PhiForCausalLM, PhiConfig(**SIZES)),
    ],
    ids=["softcap", "recurrent gemma's softcap", "divisor", "scale", "bias"],
)
def test_logit_transforms(folder, tmp_path, model_class, config):
    torch.manual_seed(1)
    model = model_class(config)
    with torch.no_grad():
        layer = model.get_output_embeddings()
        layer.weight.mul_(10)  # logits that the softcaps bend
        if layer.bias is not None:
            layer.bias.normal_()
    path = save(tmp_path / "model", folder, model)
    assert_scores_and_loss_are_the_models(make(path, tmp_path, temperature=0.8))
    if model_class in (
        GraniteForCausalLM,
        CohereForCausalLM,
        Gemma2ForCausalLM,
    ):  # of the others clipped tokens leave no gradient, or TRL no softcap
        compare(path, tmp_path, micro_batch(), temperature=0.8)


def test_a_head_that_is_a_network_is_refused(folder, tmp_path):
    path = save(tmp_path / "bert", folder, BertLMHeadModel(BertConfig(**SIZES, is_decoder=True)))
    cure = "BertLMHeadModel does more between .* trl.GRPOTrainer can train this model"
    with pytest.raises(ValueError, match=cure):
        make(AutoModelForCausalLM.from_pretrained(path, is_decoder=True), tmp_path, trainer=tokenizer_of(folder))


def tokenizer_of(folder):
    return {"processing_class": PreTrainedTokenizerFast.from_pretrained(folder)}


@pytest.mark.parametrize(
    ("tied", "adapters"),
    [
        (True, {"trainable_token_indices": [3, 50, 70]}),
        (False, {"trainable_token_indices": {"embed_tokens": [*range(2, 258)], "lm_head": [3, 50]}}),
        (False, {"modules_to_save": ["lm_head"]}),
        (True, {"target_modules": ["q_proj", "embed_tokens"]}),
    ],
    ids=["tokens", "tokens of both", "whole head", "embedding"],
)
def test_adapters_on_and_around_the_head(folder, tmp_path, tied, adapters):
    torch.manual_seed(1)
    path = save(tmp_path / "model", folder, Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)))
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **adapters})
    trainer = make(path, tmp_path, trainer={"peft_config": config}, max_steps=1, num_iterations=2)
    trainer.train()  # so that adapters differ from what they began as
    assert_scores_and_loss_are_the_models(trainer)
    gradients = loss_and_gradients(trainer, micro_batch())[1]
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert gradients.keys() == trained
    assert all(bool(gradient.abs().max() > 0) for gradient in gradients.values())


def test_a_reference_is_scored_by_the_same_head(folder, tmp_path):
    config = RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, lru_width=32)
    torch.manual_seed(1)
    model = RecurrentGemmaForCausalLM(config)
    model.get_output_embeddings().weight.data.mul_(10)
    trainer = make(save(tmp_path / "model", folder, model), tmp_path, beta=0.3)
    inputs = micro_batch(old=False)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    scores = [
        trainer._get_per_token_logps_and_entropies(model, ids, mask, 9)[0].detach()
        for model in (trainer.model, trainer.ref_model)
    ]
    assert torch.equal(*scores)
    metrics = loss_and_gradients(trainer, inputs | {"ref_per_token_logps": scores[1]})[2]
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)


def test_scores_of_a_model_in_16_bits_are_float32(folder, tmp_path):
    trainer = make(folder, tmp_path, model_init_kwargs={"dtype": "bfloat16"}, num_iterations=2, max_steps=2)
    trainer.train()
    ids = torch.arange(2, 14)[None]
    scores = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 6)[0]
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, scores.bfloat16().float())


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
