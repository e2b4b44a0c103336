"""The band: its term in the loss against eager PyTorch, its turns, and when the history learns and closes."""

import pytest
import torch

from epo_kernels.integrations.trl_loss import turns_of
from tests.integrations.trl.pairs import loss_and_gradients, make, micro_batch


def eager_entropy(model, inputs):
    """(B, T) from the model's own logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    length = inputs["completion_ids"].shape[1]
    log_p = model(input_ids=ids, attention_mask=mask).logits[:, -length - 1 : -1].log_softmax(dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def expected_term(entropy, mask, turns, upper, lower, args, phase):
    """-λ mean(H - β k P) with P written out."""
    counted = mask.bool()
    held, bands = entropy, (lower[turns], upper[turns])
    if args.band_scope == "segment":
        held = torch.zeros_like(entropy)
        for row in range(mask.shape[0]):
            for turn in turns[row][counted[row]].unique():
                own = counted[row] & (turns[row] == turn)
                held = held + torch.where(own & (torch.arange(4)[:, None] == row), entropy[row][own].mean(), 0.0)
    below, above = (bands[0] - held).clamp(min=0), (held - bands[1]).clamp(min=0)
    outside = ((below > 0) | (above > 0)).float()
    penalty = {"hinge": below + above, "quadratic": below**2 + above**2, "indicator": outside, "gate": 0 * outside}
    gate = torch.where(outside.bool() & (args.penalty == "gate"), args.penalty_alpha, 1.0)
    term = gate * entropy - phase * args.smooth_coeff * args.penalty_alpha * penalty[args.penalty]
    return -args.entropy_coef * term[counted].mean()


@pytest.mark.parametrize("penalty", ["hinge", "quadratic", "indicator", "gate"])
@pytest.mark.parametrize("band_scope", ["token", "segment"])
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_band_in_the_loss(folder, tmp_path, penalty, band_scope, beta):
    inputs = micro_batch(tools=True, ref=True)
    changes = {"beta": beta, "penalty": penalty, "penalty_alpha": 0.7, "band_scope": band_scope}
    changes |= {"band_low": 0.95, "band_high": 1.02, "smooth_coeff": 1.5, "phase_schedule": "official"}
    off = loss_and_gradients(make(folder, tmp_path, beta=beta, entropy_coef=0.0), inputs)
    trainer = make(folder, tmp_path, entropy_coef=0.3, **changes)
    mask = inputs["completion_mask"] * inputs["tool_mask"]
    turns = turns_of(mask.bool())
    entropy = eager_entropy(trainer.model, inputs)
    trainer.history.update(turns, entropy, mask)
    trainer.history.commit()
    trainer.state.global_step = 1
    on = loss_and_gradients(trainer, inputs)
    means = trainer.history.means().float()

    trainer.model.zero_grad(set_to_none=True)
    phase = trainer.args.phase_weight(1, 4)
    assert phase < 1
    entropy = eager_entropy(trainer.model, inputs)
    term = expected_term(entropy, mask, turns, 1.02 * means, 0.95 * means, trainer.args, phase)
    term.backward()
    torch.testing.assert_close(on[0], off[0] + term.detach(), rtol=1e-5, atol=1e-5)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(on[1][name], off[1][name] + parameter.grad, rtol=1e-3, atol=2e-6)
    if band_scope == "token":
        assert on[2]["epo/band_low_share"] > 0
        assert on[2]["epo/band_high_share"] > 0
    assert on[2]["epo/phase_weight"] == phase


def test_turns_are_the_runs_of_ones():
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1], [0, 1, 1, 0, 0, 1, 0, 0], [0] * 8, [1] * 8]).bool()
    turns = turns_of(mask)
    assert turns[0][mask[0]].tolist() == [0, 0, 1, 2, 2]
    assert turns[1][mask[1]].tolist() == [0, 0, 1]
    assert turns[3].tolist() == [0] * 8


class Watch:
    """What the history was given, and after how many updates and micro-batches each step closed."""

    def __init__(self, trainer, monkeypatch):
        self.updates, self.commits, self.banded = [], [], []
        history, update, commit = trainer.history, trainer.history.update, trainer.history.commit

        def watched_update(turns, entropy, mask):
            self.updates.append((trainer.state.global_step, int(mask.sum())))
            update(turns, entropy, mask)

        def watched_commit(group=None):
            self.commits.append((trainer.state.global_step, trainer._step))
            commit(group)

        compute = trainer._compute_loss

        def watched_loss(model, inputs):
            self.banded.append(len(history))
            return compute(model, inputs)

        monkeypatch.setattr(history, "update", watched_update)
        monkeypatch.setattr(history, "commit", watched_commit)
        monkeypatch.setattr(trainer, "_compute_loss", watched_loss)


@pytest.mark.parametrize(
    ("changes", "updates", "banded"),
    [
        # on policy: entropies come with the loss, of each micro-batch
        ({"gradient_accumulation_steps": 2}, [0, 0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 2, 2, 3, 3]),
        # one band for all updates of a generation; entropies from the pass over the old log-probs
        ({"steps_per_generation": 2}, [0, 2], [0, 0, 1, 1]),
        ({"num_iterations": 2}, [0, 2], [0, 0, 1, 1]),
        # the current generation in its own band
        ({"history_includes_current": True}, [0, 1, 2, 3], [1, 2, 3, 4]),
        ({"history_includes_current": True, "num_iterations": 2}, [0, 2], [1, 1, 2, 2]),
    ],
    ids=["on-policy", "minibatches", "iterations", "current", "current-iterations"],
)
def test_when_the_history_learns(folder, tmp_path, monkeypatch, changes, updates, banded):
    trainer = make(folder, tmp_path, **changes)
    watch = Watch(trainer, monkeypatch)
    trainer.train()
    assert [step for step, _ in watch.updates] == updates
    assert watch.banded == banded
    assert (
        len(trainer.history) == len(watch.commits) == banded[-1] + (0 if "history_includes_current" in changes else 1)
    )


@pytest.mark.parametrize("changes", [{}, {"num_iterations": 2}, {"history_includes_current": True}], ids=str)
def test_the_history_holds_the_sampling_policys_entropies(folder, tmp_path, monkeypatch, changes):
    """Of the first generation: those of the weights that training began with."""
    trainer = make(folder, tmp_path, max_steps=2 if "num_iterations" in changes else 1, **changes)
    generate, kept = trainer._generate_and_score_completions, []
    first = make(folder, tmp_path).model.eval()

    def watched(inputs):
        kept.append(generate(inputs))
        return kept[-1]

    monkeypatch.setattr(trainer, "_generate_and_score_completions", watched)
    trainer.train()
    (output,) = kept
    with torch.no_grad():
        entropy = eager_entropy(first, output)
    mean = entropy[output["completion_mask"].bool()].double().mean()
    torch.testing.assert_close(trainer.history.means()[0], mean, rtol=1e-5, atol=1e-5)


def test_peft_and_a_reference(folder, tmp_path):
    """With adapters the reference is the same model: its pass isn't mistaken for the policy's."""
    from peft import LoraConfig

    adapters = {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)}
    for changes in ({}, {"num_iterations": 2}):
        trainer = make(folder, tmp_path, trainer=adapters, beta=0.1, max_steps=2, **changes)
        trainer.train()
        assert trainer.history.means()[0] == pytest.approx(
            trainer.state.log_history[0]["entropy"] if changes else _mean_entropy(trainer), rel=1e-4
        )


def _mean_entropy(trainer):
    """Token mean over both generations, from the log; as many tokens in each as were logged."""
    logs = [entry for entry in trainer.state.log_history if "entropy" in entry]
    tokens = [entry["completions/mean_length"] for entry in logs]
    return sum(entry["entropy"] * n for entry, n in zip(logs, tokens, strict=True)) / sum(tokens)


def test_evaluation_leaves_the_history_alone(folder, tmp_path):
    trainer = make(folder, tmp_path, trainer={"eval_dataset": make(folder, tmp_path).train_dataset}, max_steps=1)
    trainer.train()
    before = trainer.history.state_dict()
    metrics = trainer.evaluate()
    assert {"eval_entropy", "eval_epo/penalty", "eval_epo/history"} <= metrics.keys()
    after = trainer.history.state_dict()
    assert torch.equal(before["total"], after["total"])
    assert after["open"] is None
