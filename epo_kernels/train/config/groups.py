"""The driver's settings: one dataclass per group, each with the checks between its own settings."""

import inspect
import re
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch

import epo_kernels as ek
from epo_kernels.config import (
    BandScope,
    Divergence,
    KLType,
    LossAggMode,
    Penalty,
    PolicyLossName,
    RatioGradient,
    RatioScope,
)
from epo_kernels.controller import ControllerRule
from epo_kernels.defaults import BAND
from epo_kernels.history import HistoryScope, HistoryWeighting
from epo_kernels.schedule import SCHEDULES
from epo_kernels.shaping import ShapingRule
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


# Defaults of `ek.EntropyController`, and the settings of the group loss that its arguments come from.
_CONTROLLER = {name: one.default for name, one in inspect.signature(ek.EntropyController).parameters.items()}
_CONTROLLER_SETTINGS = {
    "target": "entropy_target",
    "rule": "entropy_rule",
    "entropy_coeff": "entropy_coeff",
    "coeff_min": "entropy_coeff_min",
    "coeff_max": "entropy_coeff_max",
    "delta": "entropy_coeff_delta",
    "kp": "entropy_kp",
    "ki": "entropy_ki",
    "target_high": "entropy_target_high",
    "lr": "entropy_coeff_lr",
}


@dataclass
class WarmStartConfig:
    """Behavior cloning of demonstrations before RL."""

    demonstrations: int = setting(0, "demonstration episodes of the training split; 0: no cloning", at_least(0))
    epochs: int = setting(20, "passes over the demonstrated turns", at_least(1))
    batch_size: int = setting(64, "turns per optimizer step", at_least(1))
    lr: float = setting(2e-3, "peak learning rate; cosine decay to 0", POSITIVE)


@dataclass
class ModelConfig:
    """The policy model: its weights, precision and adapters."""

    name_or_path: str = setting(
        "tiny",
        "local folder, Hub id, or a new model that warm_start trains, by parameters: nano (0.1M) | tiny (0.5M) | small "
        "(26M)",
    )
    chat_template: str | None = setting(
        None, "null: the tokenizer's | plain (for base models) | a template file | the name of a tokenizer's template"
    )
    chat_template_kwargs: dict[str, Any] = setting(
        {}, "variables passed to the chat template, such as {enable_thinking: false}"
    )
    dtype: str = setting(
        "float32", "precision of matrix products; the weights stay in float32", one_of("float32", "bfloat16")
    )
    attn_implementation: str | None = setting(
        None,
        "attention kernel; null: transformers' choice. Flash attention needs CUDA and bfloat16, and disables packing",
        one_of("eager", "sdpa", "flash_attention_2", "flash_attention_3"),
        resume="rounding",
    )
    device: str = setting("auto", "auto | cpu | cuda | cuda:1 ...", resume="rounding")
    threads: int = setting(
        0, "PyTorch's CPU threads; 0: one per core. Small models are fastest with 1", at_least(0), resume="rounding"
    )
    fsdp: bool = setting(
        True, "under torchrun, shard the layers over the processes (FSDP2); false: each process holds the whole model"
    )
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
            "new model that knows nothing. Set it, or name a pretrained model",
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
        0.4,
        "share of GPU memory for vLLM's weights and KV cache during rollouts",
        Rule("in (0, 1)", lambda share: 0 < share < 1),
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
    environments: int = setting(
        16, "environments that run at once (ScienceWorld: one JVM each)", at_least(1), resume="rounding"
    )
    cohorts: int = setting(
        2,
        "transformers engine: groups of environments; one group steps while the policy generates for another",
        at_least(1),
        resume="rounding",
    )
    temperature: float = setting(1.0, "sampling temperature, applied to log-probs and entropies in training too")
    history: int = setting(4, "past actions shown in a prompt", at_least(0))
    history_results: int = setting(1, "how many of them are shown with the environment's response", at_least(0))
    goal_last: bool = setting(
        False, "put the goal at the end of the prompt, where two-layer models can copy from it (layout=turn)"
    )
    max_prompt_tokens: int = setting(
        256, "prompt limit; drops the oldest history first, then the end of the scene, never the goal", at_least(1)
    )
    max_response_tokens: int = setting(16, "response limit; longer responses are truncated", at_least(1))
    response_format: str = setting(
        "plain",
        "one line after an optional <think> block, or <think>...</think> <action>...</action>",
        one_of("plain", "think_action"),
    )
    instruction: str | None = setting(
        None, "first line of every prompt; null: what response_format requires, nothing for plain"
    )
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
                f"rollout.max_prompt_tokens={self.max_prompt_tokens} is not above the published {PUBLISHED_PROMPT}, "
                f"where the authors' runs crashed on long observations (they later used {NEEDED_PROMPT}); here such "
                f"prompts lose history and the end of the scene. Set rollout.max_prompt_tokens={NEEDED_PROMPT}"
            )
        if self.response_format == "think_action" and self.instruction and "<action>" not in self.instruction:
            found.append(
                "rollout.instruction does not ask for an action inside <action> </action>, which "
                "rollout.response_format=think_action requires. Add it, or set rollout.instruction=null"
            )
        return found


PUBLISHED_PROMPT, NEEDED_PROMPT = 2048, 6144


@dataclass
class AlgorithmConfig:
    """How rewards become advantages, and which episodes and turns count."""

    name: str = setting("grpo", "advantage estimator", one_of("grpo", "rloo", "gigpo", "ppo"))
    groups: int = setting(4, "tasks per step", at_least(1))
    group_size: int = setting(8, "episodes per task", at_least(1))
    normalize_std: bool = setting(
        True, "grpo, gigpo: divide advantages by the group's standard deviation; false: Dr. GRPO"
    )
    group_over: str = setting(
        "episodes",
        "grpo, rloo: compare a group's episodes, or all its turns (as in the published code)",
        one_of("episodes", "turns"),
    )
    step_weight: float = setting(
        1.0, "gigpo: weight of the comparison between turns from the same state (omega)", NOT_NEGATIVE
    )
    gae: str = setting(
        "turn",
        "ppo: one action per turn or per token in GAE; published: per token, with the whole return on every turn",
        one_of("turn", "token", "published"),
    )
    gamma: float = setting(1.0, "ppo, gigpo: discount from one action to the next", SHARE)
    lam: float = setting(1.0, "ppo: lambda of GAE; 1: Monte Carlo returns, 0: one-step TD", SHARE)
    whiten: bool = setting(True, "ppo: normalize advantages over a step's tokens to mean 0 and deviation 1")
    invalid_action_penalty: float = setting(
        0.0, "subtracted from the reward of an action that the environment does not understand", NOT_NEGATIVE
    )
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
    warmup_steps: int = setting(0, "steps at the start that train only the critic", at_least(0))


@dataclass
class LossConfig:
    """The loss (`epo_kernels.EPOConfig`), its entropy band, and corrections for rollout mismatch.

    The defaults of the band are those of `epo_kernels.defaults.BandDefaults`: the paper's hinge.
    """

    policy_loss: str = setting(ek.EPOConfig.policy_loss, "policy-gradient loss", one_of(*get_args(PolicyLossName)))
    clip_ratio_low: float = setting(
        ek.EPOConfig.clip_ratio_low,
        "ppo, cispo, gspo: the ratio is clipped to [1 - clip_ratio_low, 1 + clip_ratio_high]; gmpo clips its log; "
        "dppo: allowed divergence",
    )
    clip_ratio_high: float = setting(ek.EPOConfig.clip_ratio_high, "above clip_ratio_low: DAPO's clip-higher")
    clip_ratio_c: float | None = setting(
        ek.EPOConfig.clip_ratio_c,
        "ppo, gspo: dual-clip bound for negative advantages; dppo: bound of the ratio; null disables",
    )
    ratio_scope: str | None = setting(
        ek.EPOConfig.ratio_scope,
        "tokens that share a ratio (segment: a turn); null: the policy loss's own",
        one_of(*get_args(RatioScope)),
    )
    ratio_gradient: str = setting(
        ek.EPOConfig.ratio_gradient,
        "gradient of a shared ratio: each token's own (verl) or that of the mean (TRL)",
        one_of(*get_args(RatioGradient)),
    )
    sapo_tau_pos: float = setting(ek.EPOConfig.sapo_tau_pos, "sapo: temperature for positive advantages")
    sapo_tau_neg: float = setting(ek.EPOConfig.sapo_tau_neg, "sapo: temperature for other advantages")
    dppo_divergence: str = setting(
        ek.EPOConfig.dppo_divergence, "dppo: divergence of the trust region", one_of(*get_args(Divergence))
    )
    vespo_k_pos: float = setting(ek.EPOConfig.vespo_k_pos, "vespo: exponent k for nonnegative advantages")
    vespo_lambda_pos: float = setting(ek.EPOConfig.vespo_lambda_pos, "vespo: decay lambda for nonnegative advantages")
    vespo_k_neg: float = setting(ek.EPOConfig.vespo_k_neg, "vespo: exponent k for negative advantages")
    vespo_lambda_neg: float = setting(ek.EPOConfig.vespo_lambda_neg, "vespo: decay lambda for negative advantages")
    entropy_coeff: float = setting(
        BAND.entropy_coeff,
        "weight of the entropy bonus and the band penalty (lambda); with entropy_target, its initial value",
    )
    entropy_target: float | None = setting(
        None, "target entropy per token (nats), for which each update adjusts entropy_coeff; null: constant coefficient"
    )
    entropy_rule: str = setting(
        "step",
        "how entropy_target adjusts entropy_coeff: step (TRL's adaptive entropy), pi (EntroPIC) or boxed (AEnt)",
        one_of(*get_args(ControllerRule)),
    )
    entropy_coeff_min: float = setting(_CONTROLLER["coeff_min"], "lower bound of entropy_coeff under entropy_target")
    entropy_coeff_max: float = setting(_CONTROLLER["coeff_max"], "upper bound of entropy_coeff under entropy_target")
    entropy_coeff_delta: float = setting(_CONTROLLER["delta"], "entropy_rule=step: size of a step", NOT_NEGATIVE)
    entropy_kp: float = setting(_CONTROLLER["kp"], "entropy_rule=pi: proportional gain", NOT_NEGATIVE)
    entropy_ki: float = setting(_CONTROLLER["ki"], "entropy_rule=pi: integral gain", NOT_NEGATIVE)
    entropy_target_high: float | None = setting(
        None, "entropy_rule=boxed: entropy above which the coefficient falls; null: entropy_target"
    )
    entropy_coeff_lr: float = setting(
        _CONTROLLER["lr"], "entropy_rule=boxed: change of the coefficient per nat outside the box", NOT_NEGATIVE
    )
    kl_coeff: float = setting(
        ek.EPOConfig.kl_coeff, "weight of the KL to the reference policy (the one before RL); 0 disables"
    )
    kl_type: str = setting(ek.EPOConfig.kl_type, "KL estimator", one_of(*get_args(KLType)))
    kl_bias_correction: bool = setting(
        ek.EPOConfig.kl_bias_correction, "multiply the KL by the ratio, for an unbiased off-policy gradient"
    )
    penalty: str = setting(
        BAND.penalty, "penalty for entropy outside the band; none: no band", one_of(*get_args(Penalty))
    )
    penalty_alpha: float = setting(BAND.penalty_alpha, "size of the penalty (alpha)")
    smooth_coeff: float = setting(BAND.smooth_coeff, "weight of the penalty within the entropy term (k)")
    band_scope: str = setting(
        BAND.band_scope,
        "compare each token's entropy with the band, or a turn's mean entropy",
        one_of(*get_args(BandScope)),
    )
    loss_agg_mode: str = setting(
        ek.EPOConfig.loss_agg_mode, "aggregation of token losses", one_of(*get_args(LossAggMode))
    )
    band_low: float = setting(
        BAND.band_low, "lower bound of the band, as a multiple of the historical mean entropy (kappa_l)"
    )
    band_high: float = setting(
        BAND.band_high, "upper bound of the band, as a multiple of the historical mean entropy (kappa_r)"
    )
    history_scope: str = setting(
        BAND.history_scope, "mean over each turn index, or over all turns", one_of(*get_args(HistoryScope))
    )
    history_weighting: str = setting(
        BAND.history_weighting, "tokens, or steps, have equal weight in the mean", one_of(*get_args(HistoryWeighting))
    )
    history_window: int | None = setting(
        BAND.history_window, "most recent steps in the history; null: all", at_least(1)
    )
    history_includes_current: bool = setting(
        BAND.history_includes_current,
        "include the current step in the history; false: earlier steps only (the paper's second version)",
    )
    phase_schedule: str = setting(
        BAND.phase_schedule, "schedule of the penalty weight over training", one_of(*SCHEDULES)
    )
    phase_horizon: int | None = setting(
        BAND.phase_horizon,
        "steps that phase_schedule spans; null: schedule_steps. The published code uses 150",
        at_least(1),
    )
    rollout_is: str = setting(
        "auto",
        "importance weights for the mismatch between rollout and training; auto: token for vllm, else none",
        one_of("auto", "none", "token", "turn"),
    )
    rollout_is_cap: float = setting(2.0, "importance weights are truncated to this value; inf disables", at_least(1))

    def check(self) -> None:
        require(
            0 <= self.band_low <= self.band_high,
            "loss.band_low and loss.band_high must satisfy 0 <= band_low <= band_high, got "
            f"{self.band_low} and {self.band_high}",
        )
        require(
            self.penalty == "none" or self.entropy_coeff != 0 or self.entropy_target is not None,
            f"loss.penalty must be none with loss.entropy_coeff=0, which disables it, got {self.penalty!r}. Set "
            "loss.penalty=none, loss.entropy_coeff, or loss.entropy_target",
        )
        self.controller()

    def controller(self, device: torch.device | str = "cpu") -> ek.EntropyController | None:
        """What adjusts entropy_coeff; None without a target.

        Raises:
            ConfigError: settings that EntropyController refuses.
        """
        if self.entropy_target is None:
            return None
        values = {argument: getattr(self, name) for argument, name in _CONTROLLER_SETTINGS.items()}
        try:
            return ek.EntropyController(**values, device=device)
        except (TypeError, ValueError) as error:
            known = rf"\b({'|'.join(_CONTROLLER_SETTINGS)})\b"
            message = re.sub(known, lambda found: f"loss.{_CONTROLLER_SETTINGS[found[0]]}", str(error))
            raise ConfigError(message) from error


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
    micro_batch_tokens: int = setting(
        8192, "tokens, padding included, per forward and backward pass", at_least(1), resume="rounding"
    )
    packing: bool = setting(
        True, "pack samples into rows, with shared prompts once, where the model allows it", resume="rounding"
    )
    max_skipped_updates: int = setting(
        5, "consecutive non-finite updates of policy or critic that stop the run", at_least(1), resume="free"
    )


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
    repeated_tokens: float = setting(
        0.3, "warn from this share of response tokens that repeat earlier ones: degenerate text", SHARE
    )
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
    schedule_steps: int | None = setting(
        None, "steps that the learning-rate and penalty schedules span; null: the initial steps", at_least(1)
    )
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
