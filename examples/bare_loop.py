"""EPO in a loop of your own: a causal model of transformers, no trainer. Runs in a few seconds on a CPU.

The task: answer any prompt with even tokens alone. Four turns a dialogue, and the environment adds a token in between.
"""

from dataclasses import replace

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import epo_kernels as ek

STEPS, DIALOGUES, TURNS, WRITTEN = 40, 64, 4, 3  # tokens that the model writes in a turn


def main() -> list[float]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=64, num_hidden_layers=1, **sizes, eos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    cfg = replace(ek.EPOConfig.restoring(), entropy_coeff=1e-2, clip_ratio_c=None)
    history = ek.EntropyHistory(num_turns=TURNS)
    rewards = []
    for step in range(STEPS):
        ids = torch.randint(64, (DIALOGUES, 1))  # the prompt
        for _ in range(TURNS):
            ids = model.generate(ids, max_new_tokens=WRITTEN, do_sample=True, top_k=0)
            ids = torch.cat([ids, torch.randint(64, (DIALOGUES, 1))], dim=1)  # the environment's answer
        # Position t of what follows belongs to the token t + 1 that it predicts.
        turns = (torch.arange(ids.shape[1] - 1) // (WRITTEN + 1)).expand(DIALOGUES, -1)
        mask = torch.arange(ids.shape[1] - 1) % (WRITTEN + 1) < WRITTEN
        mask = mask.expand(DIALOGUES, -1)
        reward = ((ids[:, 1:] % 2 == 0) & mask).float().sum(dim=1) / mask.sum(dim=1)
        out = ek.linear_epo_loss(
            model.model(ids).last_hidden_state[:, :-1],
            model.lm_head.weight,
            ids[:, 1:],
            None,  # on policy: one update per batch
            (reward - reward.mean()) / (reward.std() + 1e-4),
            mask,
            cfg,
            entropy_bounds=history.bounds(turns, low=0.5, high=1.0),
            segment_ids=turns + TURNS * torch.arange(DIALOGUES)[:, None],  # each turn of each dialogue
            num_segments=TURNS * DIALOGUES,
            penalty_weight=ek.phase_weight(step, STEPS),
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        history.update(turns, out.entropy, mask)
        history.commit()
        rewards.append(float(reward.mean()))
        metrics = out.metrics.to_floats()
        if step % 10 == 9:
            print(f"step {step + 1}: reward {rewards[-1]:.2f}, entropy {metrics['entropy']:.2f} nats")
    return rewards


if __name__ == "__main__":
    main()
