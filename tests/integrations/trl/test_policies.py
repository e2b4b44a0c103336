"""Every loss type at both importance levels, with TRL's masks and weights: loss, gradients and metrics equal TRL's."""

import json
from pathlib import Path

import pytest
import torch
from trl import GRPOTrainer

from epo_kernels.integrations.trl import EPOTrainer
from epo_kernels.integrations.trl_config import FAMILIES
from tests.integrations.trl.pairs import assert_same, both, loss_and_gradients, make, micro_batch

LEVELS = ("token", "sequence")
THRESHOLD = 0.02  # between the sequences' mean log-ratios of `near`

# What changes the tokens that the loss acts on, or how strongly.
OPTIONS = {
    "plain": {},
    "bonus": {"entropy_coef": 0.5},
    "kl": {"beta": 0.3, "use_bias_correction_kl": False},
    "corrected-kl": {"beta": 0.3, "use_bias_correction_kl": True},
    "top-entropy": {"top_entropy_quantile": 0.4, "entropy_coef": 0.5},
    "off-policy-mask": {"off_policy_mask_threshold": THRESHOLD},
    "everything": {
        "beta": 0.3,
        "use_bias_correction_kl": True,
        "top_entropy_quantile": 0.6,
        "off_policy_mask_threshold": THRESHOLD,
        "entropy_coef": 0.5,
    },
}


def near(trainer, inputs, spread=0.2):
    """The inputs with old, reference and sampling log-probs near the model's own: some ratios are clipped, some not."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        own = trainer._get_per_token_logps_and_entropies(trainer.model.train(), ids, attention, length)[0]
    draw = torch.Generator().manual_seed(7)
    names = ("old_per_token_logps", "ref_per_token_logps", "sampling_per_token_logps")
    # Of the sequences with negative advantages, THRESHOLD drops the third and keeps the first.
    inputs = inputs | {"advantages": torch.tensor([-0.6, 1.2, -1.3, -0.8])}
    return inputs | {name: own + spread * torch.randn(own.shape, generator=draw) for name in names}


def compare(folder, tmp_path, change=None, seed=0, **changes):
    """TRL's trainer and ours, after the same micro-batch. change: inputs -> inputs."""
    theirs, ours = both(folder, tmp_path, epo={"penalty": "none"}, **changes)
    inputs = near(theirs, micro_batch(seed, tools=True))
    inputs = inputs if change is None else change(inputs)
    if "importance_sampling_ratio" in inputs:
        theirs.use_vllm = ours.use_vllm = True
    expected = loss_and_gradients(theirs, inputs, accumulated=3)
    assert any(bool(gradient.abs().max() > 1e-4) for gradient in expected[1].values()), "a gradient to compare"
    found = loss_and_gradients(ours, inputs, accumulated=3)
    assert_same(found, expected)
    assert found[2].keys() == expected[2].keys()
    return expected


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", FAMILIES)
def test_loss_types(folder, tmp_path, loss_type, level, option):
    changes = {"loss_type": loss_type, "importance_sampling_level": level, **OPTIONS[option]}
    compare(folder, tmp_path, gradient_accumulation_steps=3, steps_per_generation=6, temperature=0.8, **changes)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", FAMILIES)
def test_on_policy(folder, tmp_path, loss_type, level):
    def without_old(inputs):
        return {name: value for name, value in inputs.items() if name != "old_per_token_logps"}

    changes = {"loss_type": loss_type, "importance_sampling_level": level, "off_policy_mask_threshold": THRESHOLD}
    compare(folder, tmp_path, without_old, beta=0.3, **changes)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "vespo"])
def test_advantages_a_token(folder, tmp_path, loss_type, level):
    def per_token(inputs):
        return inputs | {"advantages": torch.randn(4, 9, generator=torch.Generator().manual_seed(3))}

    changes = {"loss_type": loss_type, "importance_sampling_level": level, "off_policy_mask_threshold": THRESHOLD}
    compare(folder, tmp_path, per_token, top_entropy_quantile=0.5, entropy_coef=0.1, **changes)


# TRL rejects vespo with the ratios of sequences.
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("loss_type", "shape"), [(name, (4, n)) for name in FAMILIES for n in (9, 1) if (name, n) != ("vespo", 1)]
)
def test_weights_of_a_rollout_engine(folder, tmp_path, loss_type, level, shape):
    def weighted(inputs):
        counted = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
        ratio = 0.9 + 0.2 * torch.rand(shape, generator=torch.Generator().manual_seed(3))
        if shape[1] > 1:  # TRL's is 1 where the mask is 0, and 0 where a mask mode rejects a token
            ratio = torch.where(counted, ratio, 1.0)
            ratio[1, 4] = ratio[1, 4] if loss_type == "vespo" else 0.0
        return inputs | {"importance_sampling_ratio": ratio}

    changes = {"loss_type": loss_type, "importance_sampling_level": level}
    compare(folder, tmp_path, weighted, beta=0.3, top_entropy_quantile=0.5, entropy_coef=0.1, **changes)


def test_vespo_with_rejected_tokens(folder, tmp_path):
    """A ratio of 0 makes the weight of its sequence the smallest; the other sequences keep theirs."""

    def weighted(inputs):
        ratio = torch.ones(4, 9)
        ratio[1, 4] = 0.0
        return inputs | {"importance_sampling_ratio": ratio}

    compare(folder, tmp_path, weighted, loss_type="vespo")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("delta", [1.05, 1.2, 1.6])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_two_sided_clip(folder, tmp_path, delta, level, sign):
    """Below, at and above 1 + epsilon_high."""

    def one_sign(inputs):
        # The ratios of the sequences are then below 1.05, between that and 1.2, and above 1.2.
        shift = torch.tensor([0.0, 0.15, 0.6, 0.0])[:, None]
        old = inputs["old_per_token_logps"] - shift
        return inputs | {"advantages": sign * inputs["advantages"].abs(), "old_per_token_logps": old}

    changes = {"loss_type": "grpo", "importance_sampling_level": level, "delta": delta}
    expected = compare(folder, tmp_path, one_sign, epsilon=0.1, epsilon_high=0.2, **changes)
    if sign > 0:  # TRL bounds the ratio at delta before it counts
        assert (expected[2]["clip_ratio/high_mean"] > 0) == (delta > 1.2)


def test_settings_of_the_losses(folder, tmp_path):
    powers = {"vespo_k_pos": 1.5, "vespo_lambda_pos": 0.0, "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.0}
    compare(folder, tmp_path, loss_type="vespo", **powers)
    compare(folder, tmp_path, loss_type="sapo", sapo_temperature_pos=0.6, sapo_temperature_neg=2.0)
    clipped = compare(folder, tmp_path, loss_type="cispo", epsilon_high=1.1)
    assert 0 < clipped[2]["cispo_clip_ratio"] < 1


def test_the_off_policy_mask_drops_some_sequences(folder, tmp_path):
    """So that the comparisons above have something to compare."""
    losses = [
        compare(folder, tmp_path, loss_type="dapo", off_policy_mask_threshold=threshold)[0]
        for threshold in (1e9, THRESHOLD, -1e9)
    ]
    assert len({round(float(loss), 6) for loss in losses}) == 3


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", LEVELS)
def test_evaluation(folder, tmp_path, loss_type, level):
    changes = {"loss_type": loss_type, "importance_sampling_level": level, "top_entropy_quantile": 0.5}
    theirs, ours = both(folder, tmp_path, entropy_coef=0.1, epo={"penalty": "none"}, **changes)
    inputs, found = near(theirs, micro_batch()), []
    for trainer in (theirs, ours):
        trainer.model.eval()
        trainer._metrics["eval"].clear()
        with torch.no_grad():
            loss = trainer._compute_loss(trainer.model, inputs)
        found.append((loss, {}, {name: values[-1] for name, values in trainer._metrics["eval"].items()}))
    assert found[1][2]
    assert_same(found[1], found[0])


class Engine:
    """What TRL asks of vLLM beside a `rollout_func`."""

    def sync_weights(self):
        pass


def engine_rollout(prompts, trainer):
    """Random completions with log-probs near the model's, one of them unknown, as an engine would report them."""
    draw = torch.Generator().manual_seed(trainer.state.global_step)
    rollout = {"prompt_ids": [], "completion_ids": [], "logprobs": []}
    for index, prompt in enumerate(prompts):
        prompt_ids = trainer.processing_class(prompt)["input_ids"]
        completion = torch.randint(2, 258, (5 + index % 3,), generator=draw).tolist()
        ids = torch.tensor([prompt_ids + completion])
        with torch.no_grad():
            scores = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), len(completion)
            )[0][0]
        reported = (scores + 0.4 * torch.randn(scores.shape, generator=draw)).tolist()
        reported[0] = float("nan") if index == 1 else reported[0]
        rollout["prompt_ids"].append(prompt_ids)
        rollout["completion_ids"].append(completion)
        rollout["logprobs"].append(reported)
    return rollout


LEVEL_OF = {"dapo": "token", "grpo": "sequence", "cispo": "token", "vespo": "token"}
VLLM_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [(name, mode) for name in LEVEL_OF for mode in VLLM_MODES if name != "vespo" or mode.startswith("token")],
)
def test_runs_with_vllms_correction(folder, tmp_path, loss_type, mode):
    """TRL's own weights of every mode, through whole runs with an engine that samples from another policy."""
    bounds = {"vllm_importance_sampling_clip_min": 0.7, "vllm_importance_sampling_clip_max": 1.4}
    changes = {"loss_type": loss_type, "importance_sampling_level": LEVEL_OF[loss_type], **bounds}
    changes |= {"vllm_importance_sampling_mode": mode, "off_policy_mask_threshold": 0.1, "max_steps": 3}
    changes |= {"num_iterations": 2, "optim": "sgd", "learning_rate": 0.05}
    runs = []
    for trainer in both(folder, tmp_path, trainer={"rollout_func": engine_rollout}, epo={"penalty": "none"}, **changes):
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, Engine(), -1
        trainer.train()
        runs.append(trainer)
    assert_same_runs(runs)
    logged = runs[0].state.log_history[0]
    assert logged["sampling/importance_sampling_ratio/max"] <= 1.4


def assert_same_runs(runs):
    """Weights, and everything in the log but times."""
    theirs, ours = ({n: p.detach() for n, p in trainer.model.named_parameters()} for trainer in runs)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")
    for expected, found in zip(*(trainer.state.log_history for trainer in runs), strict=True):
        expected, found = (
            {n: v for n, v in entry.items() if "time" not in n and "per_second" not in n and "epo/" not in n}
            for entry in (expected, found)
        )
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, rel=1e-3, abs=1e-4, nan_ok=True), name


ADAPTIVE = {
    "use_adaptive_entropy": True,
    "entropy_coef": 0.02,
    "entropy_coef_min": 0.05,  # above the initial one, which TRL allows
    "entropy_coef_max": 0.3,
    "entropy_coef_delta": 0.1,
    "gradient_accumulation_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 3,
}


@pytest.mark.parametrize("options", [{}, {"top_entropy_quantile": 0.5, "loss_type": "cispo", "epsilon_high": 2.0}])
def test_adaptive_entropy_and_its_checkpoint(folder, tmp_path, options):
    target = middle_entropy(folder, tmp_path / "first", options)
    changes = ADAPTIVE | options | {"entropy_target": target}
    runs, resumed, states = [], [], []
    for kind, own in ((GRPOTrainer, {}), (EPOTrainer, {"penalty": "none"})):  # one by one: each sets the seed
        path = tmp_path / kind.__name__
        arguments = {"kind": kind, **own}
        runs.append(make(folder, path, **arguments, **changes))
        runs[-1].train()
        states.append(read_state(path / "checkpoint-3"))
        resumed.append(make(folder, path / "resumed", **arguments, **changes))
        resumed[-1].train(resume_from_checkpoint=str(path / "checkpoint-3"))
    assert_same_runs(runs)
    assert_same_runs(resumed)
    assert states[1] == pytest.approx(states[0], rel=1e-5)
    coefficients = [entry["entropy_coef"] for entry in runs[1].state.log_history if "entropy_coef" in entry]
    assert len({round(value, 6) for value in coefficients}) > 1, "the coefficient moves"
    ends = [read_state(trainer.args.output_dir + "/checkpoint-6") for trainer in (runs[1], resumed[1])]
    assert ends[0] == ends[1]


def middle_entropy(folder, path, options):
    """An entropy that the runs above exceed at some updates and not at others."""
    first = make(folder, path, GRPOTrainer, **(ADAPTIVE | options | {"entropy_target": 100.0, "save_strategy": "no"}))
    seen, log = [], first.log
    first.log = lambda *args: (seen.append(first._last_world_entropy), log(*args))
    first.train()
    entropies = sorted(seen[:6])
    return (entropies[2] + entropies[3]) / 2


def read_state(checkpoint):
    return json.loads(Path(checkpoint, "entropy_ctrl_state.json").read_text())


def test_an_update_without_tokens_counts_as_entropy_0(folder, tmp_path):
    changes = {"use_adaptive_entropy": True, "entropy_coef": 0.1, "entropy_target": 0.5}
    trainers = both(folder, tmp_path, epo={"penalty": "none"}, **changes)
    inputs = micro_batch()
    inputs["tool_mask"] = torch.zeros_like(inputs["completion_mask"])
    for trainer in trainers:
        loss_and_gradients(trainer, inputs)
    theirs, ours = ((trainer.entropy_coef, trainer._last_world_entropy) for trainer in trainers)
    assert ours == theirs


def test_evaluation_leaves_the_coefficient_alone(folder, tmp_path):
    trainer = make(folder, tmp_path, use_adaptive_entropy=True, entropy_target=100.0)
    loss_and_gradients(trainer, micro_batch())
    before = trainer.entropy_coef
    trainer.model.eval()
    with torch.no_grad():
        trainer._compute_loss(trainer.model, micro_batch())
    assert trainer.entropy_coef == before > 0.0
