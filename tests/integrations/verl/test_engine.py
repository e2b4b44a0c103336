"""A real update by verl's FSDP engine: against verl's own losses, and against the library on the same logits."""

import re
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics
from verl.models.transformers import monkey_patch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils

import epo_kernels as ek
from epo_kernels.integrations.verl import EngineLoss, EPOTrainingWorker, turns_of_mask
from tests.integrations.verl.harness import (
    PROMPT,
    VOCAB,
    actor_config,
    batch_of,
    episodes,
    make_worker,
    nested,
    update,
    update_again,
)

PAGE = Path(__file__).parents[3] / "docs" / "verl.md"
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
POLICY = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1.5}
KL = {"use_kl_loss": True, "kl_loss_coef": 0.2}
PLAIN = {"penalty": "none"}
BAND = {"band_low": 0.9, "band_high": 1.1, "history_weighting": "token"}


def assert_same_gradients(gradients, expected):
    """But for rounding: the two go through a whole model in float32, in sums of another order."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest)


def assert_same_update(worker, metrics, expected_metrics, expected_gradients):
    of_the_run = ("perf/", "mfu")
    assert set(metrics) == set(expected_metrics)
    for name, value in expected_metrics.items():
        if not name.startswith(of_the_run):
            assert metrics[name] == pytest.approx(value, rel=2e-5, abs=1e-6), name
    assert_same_gradients(worker.gradients, expected_gradients)


# ---- against verl ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove_padding", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_without_a_penalty_it_is_verls_vanilla_loss(workers, mode, remove_padding):
    worker = workers(remove_padding)
    kl_type = dict(zip(MODES, ("kl", "abs", "mse", "low_var_kl", "k3"), strict=True))[mode]
    keys = {**POLICY, **KL, "kl_loss_type": kl_type, "loss_agg_mode": mode, "entropy_coeff": 0.3}
    vanilla = update(worker, actor_config("vanilla", **keys), episodes())
    expected = worker.gradients
    assert vanilla["actor/pg_clipfrac"] > 0
    assert vanilla["actor/pg_clipfrac_lower"] > 0
    assert_same_update(worker, update(worker, actor_config(epo=PLAIN, **keys), episodes()), vanilla, expected)


def test_without_entropy_and_kl_too(workers):
    tensors = episodes()
    del tensors["ref_log_prob"], tensors["rollout_is_weights"]
    vanilla = update(workers(), actor_config("vanilla"), tensors, calculate_entropy=False)
    expected = workers().gradients
    ours = update(workers(), actor_config(epo=PLAIN), tensors, calculate_entropy=False)
    assert_same_update(workers(), ours, vanilla, expected)


def test_a_constant_length_and_a_sequence_without_tokens(workers):
    tensors = episodes()
    tensors["response_mask"][1] = 0
    for mode in MODES:
        keys = {**POLICY, "entropy_coeff": 0.3, "loss_agg_mode": mode, "loss_scale_factor": 20}
        vanilla = update(workers(), actor_config("vanilla", **keys), tensors)
        expected = workers().gradients
        assert_same_update(workers(), update(workers(), actor_config(epo=PLAIN, **keys), tensors), vanilla, expected)


@pytest.mark.parametrize("mode", MODES)
def test_the_registered_policy_loss_is_vanillas(mode):
    tensors = episodes()
    old, mask = tensors["old_log_probs"], tensors["response_mask"].bool()
    results = {}
    for name in ("vanilla", "epo"):
        config = actor_config(name, PLAIN if name == "epo" else None, **POLICY, loss_agg_mode=mode)
        config.global_batch_info.update(dp_size=2, batch_num_tokens=40, global_batch_size=8, loss_scale_factor=None)
        log_probs = (old + 0.5 * tensors["ref_log_prob"] + 2.0).requires_grad_()
        loss, metrics = get_policy_loss_fn(name)(
            old, log_probs, tensors["advantages"], mask, mode, config, tensors["rollout_is_weights"]
        )
        loss.backward()
        results[name] = loss.detach(), log_probs.grad, metrics
    assert_close(results["epo"][:2], results["vanilla"][:2], rtol=1e-6, atol=1e-7)
    assert results["epo"][2] == pytest.approx(results["vanilla"][2])


def test_the_registered_policy_loss_refuses_a_band():
    config = actor_config(entropy_coeff=0.1)  # hinge by default
    with pytest.raises(ValueError, match=r"epo\.penalty=hinge .* Set .*epo\.penalty=none"):
        get_policy_loss_fn("epo")(*[torch.zeros(1, 1)] * 4, "token-mean", config)


# ---- against the library --------------------------------------------------------------------------------------------


def library_loss(model_path, tensors, cfg, turns, history, penalty_weight=1.0):
    """(EPOOutput, gradients by name): the whole batch in one pass of the bare model, by `epo_loss` on its logits."""
    model = Qwen2ForCausalLM.from_pretrained(model_path, attn_implementation="eager", dtype=torch.float32)
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask", "position_ids")}
    out = ek.epo_loss(
        model(**inputs).logits[:, PROMPT - 1 : -1],
        tensors["responses"],
        tensors["old_log_probs"],
        tensors["advantages"],
        tensors["response_mask"],
        cfg,
        entropy_bounds=history.bounds(turns, BAND["band_low"], BAND["band_high"]),
        segment_ids=turns + 100 * torch.arange(len(turns))[:, None],
        num_segments=400,
        ref_log_probs=tensors["ref_log_prob"],
        is_weights=tensors["rollout_is_weights"],
        penalty_weight=penalty_weight,
    )
    out.loss.backward()
    return out, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("penalty", "scope"),
    [("hinge", "token"), ("hinge", "segment"), ("quadratic", "segment"), ("gate", "token"), ("indicator", "token")],
)
def test_with_a_penalty_it_is_epo_loss_on_the_same_logits(workers, model_path, penalty, scope, mode):
    penalty = {"penalty": penalty, "penalty_alpha": 1.7, "smooth_coeff": 1.2, "band_scope": scope}
    keys = {**POLICY, **KL, "entropy_coeff": 0.3, "loss_agg_mode": mode}
    worker, tensors = workers(), episodes()
    first = update(worker, actor_config(epo={**penalty, **BAND, "phase_schedule": "paper"}, **keys), tensors)
    second = update_again(worker, tensors)

    mask = tensors["response_mask"].bool()
    turns, history = turns_of_mask(mask), ek.EntropyHistory(64)
    own_mode, scale = ("token-mean", mask.sum().item()) if mode == "token-sum" else (mode, 1)
    cfg = ek.EPOConfig(**POLICY, **penalty, entropy_coeff=0.3, kl_coeff=0.2, loss_agg_mode=own_mode, temperature=0.7)
    before, _ = library_loss(model_path, tensors, cfg, turns, history)
    assert first["loss"] == pytest.approx(scale * before.loss.item(), rel=2e-5)
    assert first["epo/band_low_share"] == 0
    history.update(turns, before.entropy, mask)
    history.commit()
    weight = ek.phase_weight(1, 10, "paper")
    out, gradients = library_loss(model_path, tensors, cfg, turns, history, weight)
    assert out.metrics.below_band_tokens > 0
    assert out.metrics.above_band_tokens > 0
    assert second["loss"] == pytest.approx(scale * out.loss.item(), rel=2e-5)
    assert second["epo/penalty_weight"] == weight
    if penalty["penalty"] != "gate":
        assert second["epo/penalty"] == pytest.approx(scale * out.metrics.penalty.item(), rel=2e-5)
    assert_same_gradients(worker.gradients, {name: scale * gradient for name, gradient in gradients.items()})


# ---- turns and history ----------------------------------------------------------------------------------------------

HINGE = {"penalty": "hinge", "penalty_alpha": 2.0, "phase_schedule": "constant", **BAND}


def test_turns_of_mask():
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1], [0, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 0]]).bool()
    turns = turns_of_mask(mask)
    assert turns[mask].tolist() == [0, 0, 1, 2, 0, 0, 0, 0]


def test_turns_come_from_a_field_where_each_turn_is_a_sample(workers):
    worker, tensors = workers(), episodes()
    actor = actor_config(epo={**HINGE, "turns": "turn", "num_turns": 8}, entropy_coeff=0.1)
    update(worker, actor, tensors, turn=[3, 0, 3, 7])
    known = ~torch.isnan(worker.epo.history.means())
    assert known.nonzero().flatten().tolist() == [0, 3, 7]
    assert worker.epo.history.state_dict()["total"][1, 3] == tensors["response_mask"][[0, 2]].sum()


def test_a_field_may_hold_the_turn_of_each_token(workers):
    worker, tensors = workers(), episodes()
    runs = update(worker, actor_config(epo=HINGE, entropy_coeff=0.1), tensors), update_again(worker, tensors)
    of_runs = worker.epo.history.means()
    tensors["turn_ids"] = turns_of_mask(tensors["response_mask"].bool())
    actor = actor_config(epo={**HINGE, "turns": "turn_ids"}, entropy_coeff=0.1)
    field = update(worker, actor, tensors), update_again(worker, tensors)
    assert_close(worker.epo.history.means(), of_runs, equal_nan=True)
    assert [metrics["loss"] for metrics in field] == pytest.approx([metrics["loss"] for metrics in runs])


def test_the_pages_agent_loop_output_brings_its_turn_into_the_batch():
    (code,) = re.findall(r"```python[^\n]*\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names = {"__name__": "page"}
    exec(code, names)
    common = {"prompt_ids": [1], "response_ids": [2, 3], "response_mask": [1, 1], "metrics": AgentLoopMetrics()}
    outputs = [names["TurnOutput"](turn=turn, **common).as_dict() for turn in (3, 0)]
    data = tensordict_utils.list_of_dict_to_tensordict(outputs)
    loss = EngineLoss(actor_config(epo={**HINGE, "turns": "turn", "num_turns": 8}, entropy_coeff=0.1))
    assert loss._turns(data, data["response_mask"].bool()).tolist() == [[3, 3], [0, 0]]


def test_a_sample_that_fills_the_batch_up_may_keep_the_turns_of_another(workers):
    """verl's trainer appends copies of a sample with a response of one masked token, and leaves other fields whole."""
    worker, tensors = workers(True), episodes()
    tensors["turn_ids"] = turns_of_mask(tensors["response_mask"].bool())
    data = nested(tensors)
    for name, value in data.items():
        rows = list(value.unbind())
        if name == "input_ids" or name == "position_ids":
            rows[3] = rows[3][: len(data["prompts"][3]) + 1]
        elif name not in ("prompts", "turn_ids"):
            rows[3] = rows[3][:1] * 0
        data[name] = torch.nested.as_nested_tensor(rows, layout=torch.jagged)
    seen = []
    for turns in ("response_mask", "turn_ids"):
        actor = actor_config(epo={**HINGE, "turns": turns}, entropy_coeff=0.1)
        update(worker, actor, data, micro_batch_size_per_gpu=1, use_dynamic_bsz=False)
        seen.append(update_again(worker, data, micro_batch_size_per_gpu=1, use_dynamic_bsz=False)["epo/penalty"])
    assert seen[1] == pytest.approx(seen[0])
    assert seen[0] > 0


def test_turns_that_cannot_be_are_named(workers):
    tensors = episodes()
    for epo, batch, message in (
        ({"num_turns": 2}, {}, r"turns must be in \[0, 2\), got 0 to 2: .*epo.num_turns"),
        ({"turns": "step"}, {}, "turns=step: the batch has no such field, it has .*response_mask"),
        ({"turns": "turn"}, {"turn": [0, -1, 0, 0]}, r"turns must be in .*, got -1 to"),
        ({"turns": "prompts"}, {}, "the field must have one integer per sample"),
    ):
        with pytest.raises(ValueError, match=message):
            update(workers(), actor_config(epo={**HINGE, **epo}, entropy_coeff=0.1), tensors, **batch)
    tensors["turn_ids"] = turns_of_mask(tensors["response_mask"].bool())
    data = nested(tensors)
    short = [row[:-1] for row in data["turn_ids"].unbind()]
    data["turn_ids"] = torch.nested.as_nested_tensor(short, layout=torch.jagged)
    with pytest.raises(ValueError, match=r"turns must be in .*, got -1 to"):
        update(workers(True), actor_config(epo={**HINGE, "turns": "turn_ids"}, entropy_coeff=0.1), data)


def test_the_band_stands_still_within_a_step_of_several_epochs_and_mini_batches(workers):
    worker, tensors = workers(), episodes()
    actor = actor_config(epo=HINGE, entropy_coeff=0.1)
    metrics = update(worker, actor, tensors, epochs=2, mini_batch_size=2)
    assert metrics["epo/band_low_share"] == metrics["epo/band_high_share"] == 0
    history = worker.epo.history
    assert len(history) == 1
    assert history.state_dict()["total"][1].sum() == 2 * tensors["response_mask"].sum()
    update(worker, actor, tensors)
    assert_close(history.means(), worker.epo.history.means(), equal_nan=True)  # the weights never moved
    assert update_again(worker, tensors)["epo/band_low_share"] > 0


def test_evaluation_adds_nothing_to_the_history(workers):
    worker, tensors = workers(), episodes()
    update(worker, actor_config(epo=HINGE, entropy_coeff=0.1), tensors)
    before = worker.epo.history.state_dict()
    worker.infer_batch(batch_of(tensors))
    assert worker.epo.history.state_dict()["open"] is None
    assert_close(worker.epo.history.state_dict()["total"], before["total"], rtol=0, atol=0)


def test_dynamic_batches_give_the_same_update(workers):
    worker, tensors = workers(), episodes()
    actor = actor_config(epo={**HINGE, "band_scope": "segment"}, entropy_coeff=0.3)
    update(worker, actor, tensors)
    fixed = update_again(worker, tensors)
    expected = worker.gradients
    update(worker, actor, tensors)
    metrics = update_again(worker, tensors, use_dynamic_bsz=True, max_token_len_per_gpu=16)
    assert metrics["loss"] == pytest.approx(fixed["loss"], rel=2e-5)
    assert_same_gradients(worker.gradients, expected)


def test_nested_batches_give_the_same_update(workers):
    worker, tensors = workers(True), episodes()
    tensors["turn_ids"] = turns_of_mask(tensors["response_mask"].bool())
    for turns in ("response_mask", "turn_ids"):
        actor = actor_config(epo={**HINGE, "band_scope": "segment", "turns": turns}, entropy_coeff=0.3)
        update(worker, actor, tensors)
        padded = update_again(worker, tensors)
        expected = worker.gradients
        update(worker, actor, nested(tensors))
        assert_same_update(worker, update_again(worker, nested(tensors)), padded, expected)


# ---- the worker -----------------------------------------------------------------------------------------------------


def test_the_history_goes_with_the_checkpoint(workers, tmp_path, caplog):
    worker, tensors = workers(), episodes()
    actor = actor_config(epo=HINGE, entropy_coeff=0.1)
    update(worker, actor, tensors)
    worker.save_checkpoint(str(tmp_path / "global_step_1" / "actor"), None, 1)
    expected = update_again(worker, tensors)
    gradients = worker.gradients

    update(worker, actor, episodes(seed=5))  # another history, in a loss of its own
    worker.load_checkpoint(str(tmp_path / "global_step_1" / "actor"))
    assert len(worker.epo.history) == 1
    assert_same_update(worker, update_again(worker, tensors), expected, gradients)

    (tmp_path / "global_step_1" / "actor" / "epo_entropy_history.pt").unlink()
    worker.load_checkpoint(str(tmp_path / "global_step_1" / "actor"))
    assert "no entropy history beside the checkpoint" in caplog.text


def test_the_worker_is_verls_own_for_other_losses(workers, tmp_path):
    worker = workers()
    assert isinstance(worker, EPOTrainingWorker)
    update(worker, actor_config(epo=HINGE, entropy_coeff=0.1), episodes())
    update(worker, actor_config("vanilla", entropy_coeff=0.1), episodes())
    assert worker.epo is None
    worker.save_checkpoint(str(tmp_path / "actor"), None, 1)
    assert not (tmp_path / "actor" / "epo_entropy_history.pt").exists()


# ---- the head -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remove_padding", [False, True])
def test_the_fused_head_equals_verls_own(workers, remove_padding):
    actor, tensors = actor_config("vanilla", **POLICY, entropy_coeff=0.3), episodes()
    plain = update(workers(remove_padding), actor, tensors)
    expected = workers(remove_padding).gradients
    worker = workers(remove_padding, "epo")
    assert_same_update(worker, update(worker, actor, tensors), plain, expected)


def test_the_fused_head_follows_the_weights(model_path):
    """Each pass gathers the head again, after an update and after a pass without gradient."""
    actor, tensors = actor_config("vanilla", **POLICY, entropy_coeff=0.3), episodes()
    seen = []
    for fused in (None, "epo"):
        worker = make_worker(model_path, remove_padding=True, fused=fused, lr=0.01)
        steps = []
        for _ in range(3):
            metrics = update(worker, actor, tensors)
            scores = worker.infer_batch(batch_of(tensors))
            assert isinstance(worker.engine.module.lm_head.weight, DTensor)  # no whole head stays behind
            steps.append((metrics["loss"], metrics["actor/entropy_loss"], scores["log_probs"].values().sum().item()))
        seen.append(steps)
    assert seen[0][0] != pytest.approx(seen[0][1])
    for plain, own in zip(*seen, strict=True):
        assert own == pytest.approx(plain, rel=1e-3)


def test_the_fused_head_makes_no_logits(workers, monkeypatch):
    called = []
    whole = ek.integrations.verl.linear_log_probs_and_entropy

    def spy(*args, **kwargs):
        called.append(kwargs["temperature"])
        return whole(*args, **kwargs)

    monkeypatch.setattr("epo_kernels.integrations.verl.linear_log_probs_and_entropy", spy)
    worker = workers(True, "epo")
    monkeypatch.setattr(
        worker.engine.module.lm_head, "forward", lambda *_: pytest.fail("the head was applied to hidden states")
    )
    update(worker, actor_config(epo=HINGE, entropy_coeff=0.3), episodes())
    assert called == [0.7, 0.7]  # once a micro-batch


SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
HEADS = {
    "softcap": (Gemma2ForCausalLM, Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=3.0)),
    "divisor": (GraniteForCausalLM, GraniteConfig(**SIZES, logits_scaling=2.5)),
    "scale": (CohereForCausalLM, CohereConfig(**SIZES, logit_scale=0.25)),
    "bias": (PhiForCausalLM, PhiConfig(**SIZES)),
}


@pytest.mark.parametrize("name", HEADS)
def test_the_fused_head_does_what_the_models_own_does(tmp_path, name):
    family, config = HEADS[name]
    torch.manual_seed(0)
    model = family(config)
    with torch.no_grad():
        layer = model.get_output_embeddings()
        layer.weight.mul_(2)
        if layer.bias is not None:
            layer.bias.normal_()
    model.save_pretrained(tmp_path)
    actor, tensors = actor_config("vanilla", **POLICY, entropy_coeff=0.3), episodes()
    plain, fused = (make_worker(tmp_path, fused=fused, family=family) for fused in (None, "epo"))
    expected = update(plain, actor, tensors)
    assert_same_update(fused, update(fused, actor, tensors), expected, plain.gradients)


def test_a_head_that_is_not_served_is_refused_by_name():
    class Doubled(Qwen2ForCausalLM):
        def forward(self, **kwargs):
            output = super().forward(**kwargs)
            output.logits = 2 * output.logits
            return output

    for family, config in ((Doubled, Qwen2Config(**SIZES)), (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES))):
        forward = family.forward
        with pytest.raises(ValueError, match=f"impl_backend=epo: {family.__name__}.*use_fused_kernels=false"):
            monkey_patch.patch_forward_with_backends(family(config), True, "epo")
        assert family.forward is forward


def test_a_class_that_is_patched_already_is_compared_with_its_own_forward(monkeypatch):
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)  # put back afterwards
    for _ in range(2):
        monkey_patch.patch_forward_with_backends(Qwen2ForCausalLM(Qwen2Config(**SIZES)), True, "epo")
