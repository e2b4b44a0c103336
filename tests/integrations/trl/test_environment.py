"""Turns of TRL's tool loop: an environment answers between what the model writes."""

from pathlib import Path

import trl
from datasets import Dataset

from epo_kernels.integrations.trl_loss import loss_mask, turns_of
from tests.integrations.trl.pairs import make

CALL = '<tool_call>\n{"name": "press", "arguments": {"key": "a"}}\n</tool_call><|im_end|>'


class Keyboard:
    """Rewards keys pressed."""

    def reset(self, **kwargs):
        self.pressed = []

    def press(self, key: str) -> str:
        """Press a key.

        Args:
            key: The key.

        Returns:
            What it says.
        """
        self.pressed.append(key)
        return f"click {key}"

    def get_reward(self):
        return float(len(self.pressed))


def test_an_environment_factory(folder, tmp_path, monkeypatch):
    """The tiny model writes no call of a tool: what it would write is given, everything else is TRL's."""
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer = make(folder, tmp_path).processing_class
    tokenizer.chat_template = template.read_text()
    prompts = Dataset.from_dict({"prompt": [[{"role": "user", "content": "type"}]] * 8})
    arguments = {"reward_funcs": None, "environment_factory": Keyboard, "processing_class": tokenizer}
    trainer = make(
        folder,
        tmp_path,
        trainer=arguments | {"train_dataset": prompts},
        max_steps=2,
        max_completion_length=256,
        entropy_coef=0.1,
        history_weighting="token",  # its totals count tokens
    )
    call, rest = (tokenizer(text)["input_ids"] for text in (CALL, "done<eos>"))
    batches = []

    def written(prompt_ids, images, multimodal, num_generations, has_tool_images=False):
        first = not batches or len(batches) % 2 == 0
        batches.append(len(prompt_ids))
        return [call if first and number % 2 == 0 else rest for number in range(len(prompt_ids))], None

    compute, masks = trainer._compute_loss, []

    def watched(model, inputs):
        masks.append(loss_mask(inputs))
        return compute(model, inputs)

    monkeypatch.setattr(trainer, "_generate_single_turn", written)
    monkeypatch.setattr(trainer, "_compute_loss", watched)
    trainer.train()
    assert batches == [4, 2, 4, 2]
    # TRL shuffles the completions of a generation
    turns = sorted(int(turns_of(mask)[mask].max()) for mask in masks[0][:, None])
    assert turns == [0, 0, 1, 1]
    counts = trainer.history.state_dict()["total"][1]
    assert counts[:3].tolist() == [4 * (len(call) + len(rest)), 4 * len(rest), 0]
