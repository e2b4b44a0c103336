"""The driver's configuration: dataclasses, and the one place that reads, merges and checks them.

Sources, each over the one before: the defaults below, a preset, YAML files, `a.b=c` from the command line.
"""

import inspect
import math
import os
import re
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

import epo_kernels as ek
from epo_kernels.train.envs import EnvConfig
from epo_kernels.train.settings_file import ConfigError, Layer, parse_settings, read_settings_file

FROM_SCRATCH: dict[str, dict[str, Any]] = {  # Qwen2's settings, without a download; for head_dims vLLM serves
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8},
}


@dataclass
class WarmStartConfig:
    """Cloning of demonstrations before RL."""

    demonstrations: int = 0  # shown episodes of the training split; 0: no cloning
    epochs: int = 20  # passes over their turns
    batch_size: int = 64  # turns an optimiser step
    lr: float = 2e-3  # peak; cosine to 0


@dataclass
class ModelConfig:
    """The policy: which model, in which precision, how much of it is trained."""

    name_or_path: str = "tiny"  # a folder, a hub id, or from scratch, made for warm_start: tiny (0.5M) | small (26M)
    chat_template: str | None = (
        None  # null: the tokenizer's | plain (for base models) | a file | the name of one it has
    )
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict
    )  # its variables, such as {enable_thinking: false}
    dtype: str = "float32"  # of matrix products: float32 | bfloat16; the weights stay float32
    device: str = "auto"  # auto | cpu | cuda | cuda:1 ...
    threads: int = 0  # of torch on the CPU; 0: a thread a core. Small models are fastest with 1
    fsdp: bool = True  # under torchrun: split layers over the processes (FSDP2); false: each keeps the whole model
    gradient_checkpointing: bool = False  # keep a layer's input alone and compute it again in backward: less memory
    lora_rank: int = 0  # train low-rank adapters (PEFT) of this rank instead of all weights; 0: all weights
    lora_alpha: float = 32.0  # their scale is alpha / rank
    lora_targets: str = "all-linear"  # the modules that get one: all-linear, or names with commas between them
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)


@dataclass
class VllmConfig:
    """The vLLM engine's share of the machine."""

    memory_share: float = 0.4  # of the GPU's memory, for its weights and cache of keys and values while it plays
    sleep: bool = True  # on a GPU: leave that memory to training between rollouts
    cpu_cache_gb: float = 1.0  # on the CPU: of the cache of keys and values


@dataclass
class RolloutConfig:
    """How episodes are played, and what of them a prompt shows."""

    engine: str = "transformers"  # what samples: transformers, with the training model itself | vllm, with a copy
    environments: int = 16  # live at a time (ScienceWorld: a JVM each)
    cohorts: int = 2  # transformers: groups of environments; one acts while the policy writes for another
    temperature: float = 1.0  # of sampling, and of every log-prob and entropy in training
    history: int = 4  # past actions a prompt shows
    history_results: int = 1  # of those, how many with the environment's answer
    goal_last: bool = False  # the goal ends the prompt, near to the action: models of two layers copy from there alone
    max_prompt_tokens: int = 256  # the oldest history goes first, then the scene's end; the goal never
    max_response_tokens: int = 16  # what is longer is cut there
    response_format: str = "plain"  # plain: a line, after a <think> block if any | think_action: <think>..<action>..
    instruction: str | None = None  # first line of a prompt; null: what think_action needs, nothing for plain
    admissible_actions: bool = False  # prompts list what can be done now (practice, alfworld)
    layout: str = "turn"  # turn: a prompt anew each turn, a sample a turn | episode: one growing dialogue, one sample
    vllm: VllmConfig = field(default_factory=VllmConfig)


@dataclass
class AlgorithmConfig:
    """How advantages are made of rewards, and which episodes and turns count."""

    name: str = "grpo"  # grpo | rloo | gigpo | ppo
    groups: int = 4  # tasks a step
    group_size: int = 8  # episodes a task
    normalize_std: bool = True  # grpo, gigpo: divide by the group's standard deviation (false: Dr. GRPO)
    group_over: str = "episodes"  # grpo, rloo: a group's members: episodes | turns (each counts, as published)
    step_weight: float = 1.0  # gigpo: omega, weight of the comparison among turns taken in the same state
    gae: str = "turn"  # ppo: an action is a: turn | token | published (by tokens, each turn with the whole return)
    gamma: float = 1.0  # ppo, gigpo: discount from an action to the next
    lam: float = 1.0  # ppo: lambda of GAE; 1 trusts the rewards alone, 0 the critic's next value
    whiten: bool = True  # ppo: advantages with mean 0 and deviation 1 over a step's tokens
    invalid_action_penalty: float = 0.0  # taken off the reward of an action that the environment doesn't understand
    kl_reward_coeff: float = 0.0  # KL to the policy before RL, taken off the reward (loss.kl_type; not loss.kl_coeff)
    refills: int = 0  # dynamic sampling: how often groups whose returns are all equal are drawn anew; 0: they stay
    mask_truncated: bool = False  # responses as long as rollout.max_response_tokens don't count in the loss


@dataclass
class CriticConfig:
    """PPO's critic: a copy of the policy's backbone with a value head. Optimiser settings not here are optim's."""

    lr: float = 1e-4  # its own, with the schedule of optim
    clip_range: float = 0.5  # a value may move so far from the old one in a step before its loss is clipped
    epochs: int = 1  # passes over a step's samples
    minibatches: int = 1  # optimiser updates a pass
    minibatch_size: int = 0  # samples an update; 0: minibatches decides
    warmup_steps: int = 0  # steps at the start that train the critic alone


@dataclass
class LossConfig:
    """The fields of `epo_kernels.EPOConfig` (temperature is rollout.temperature), then band, history, schedule."""

    clip_ratio_low: float = 0.2  # the ratio is clipped to [1 - low, 1 + high]
    clip_ratio_high: float = 0.2  # above low: DAPO's clip-higher
    clip_ratio_c: float | None = 3.0  # dual clip of negative advantages; null: none
    entropy_coeff: float = 1e-3  # lambda, of bonus and penalty
    kl_coeff: float = 0.0  # KL to the policy before RL; 0: no reference model
    kl_type: str = "k3"  # k1 | k2 | k3 | abs
    penalty: str = "none"  # outside the entropy band: none | hinge | quadratic | indicator | gate
    penalty_alpha: float = 0.1  # alpha, its size
    smooth_coeff: float = 1.0  # k, its weight within the entropy term
    band_scope: str = "token"  # token | segment (a turn)
    loss_agg_mode: str = "token-mean"  # | seq-mean-token-sum | seq-mean-token-mean | seq-mean-token-sum-norm
    band_low: float = 0.0  # kappa_l: the band's lower bound as a share of the history's entropy
    band_high: float = 2.0  # kappa_r
    history_scope: str = "turn"  # turn | global
    history_weighting: str = "token"  # token | step
    history_window: int | None = None  # steps that count; null: all
    history_includes_current: bool = True  # false: the band knows earlier steps alone (the paper's second version)
    phase_schedule: str = "paper"  # weight of the penalty over the steps: constant | paper | official
    phase_horizon: int | None = None  # steps it spans; null: schedule_steps. The published code's official one has 150
    rollout_is: str = "auto"  # importance weights by: none | token | turn | auto (vllm: token, transformers: none)
    rollout_is_cap: float = 2.0  # where they are truncated; inf: nowhere


@dataclass
class OptimConfig:
    """AdamW, its schedule, and a step's updates; the critic's too, where critic doesn't say otherwise."""

    lr: float = 1e-4  # AdamW: the peak, after the warm-up
    min_lr_ratio: float = 0.2  # the cosine ends at lr * min_lr_ratio
    warmup_ratio: float = 0.1  # share of all updates
    weight_decay: float = 0.0  # of AdamW
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.999  # of AdamW
    max_grad_norm: float = 1.0  # gradients are clipped to this norm
    epochs: int = 1  # passes over a step's turns
    minibatches: int = 1  # optimiser updates a pass over them
    minibatch_size: int = 0  # samples an update, in verl ppo_mini_batch_size; 0: minibatches decides
    micro_batch_tokens: int = 8192  # tokens in one forward and backward, padding included
    packing: bool = True  # pack samples into rows, shared prompts once, where the model allows it
    max_skipped_updates: int = 5  # updates of policy or critic in a row that are not finite and stop the run


@dataclass
class EvaluateConfig:
    """Evaluation on fixed tasks, before, after and between."""

    panels: list[str] = field(default_factory=lambda: ["iid"])  # of iid, ood, train
    episodes: int = 128  # a panel: the first tasks of the split, in its fixed order
    decoding: list[str] = field(default_factory=lambda: ["greedy", "sampled"])
    every: int = 0  # steps; 0: only before and after


@dataclass
class CheckpointConfig:
    """run_dir/checkpoints/global_step_N: what a run goes on from."""

    every: int = 10  # steps; 0: only at the end
    keep: int = 2  # the latest ones


@dataclass
class WatchConfig:
    """Signs that a policy collapses, each a warning with its figure."""

    entropy_low: float = 0.005  # nats a token; below it the policy hardly explores any more
    entropy_high: float = 4.0  # nats a token; above it the policy writes noise
    uniform_groups: float = 0.9  # share of groups whose returns are all equal, from which on little is learnt
    repeated_tokens: float = 0.3  # share of response tokens that repeat what the response held before
    valid_actions: float = 0.1  # share of actions that the environment understands; below it little can be learnt
    patience: int = 3  # steps in a row before a warning
    stop: bool = False  # end the run at the first warning, with a checkpoint


@dataclass
class TrackingConfig:
    """Weights & Biases, beside the files and TensorBoard that every run writes."""

    wandb: str = "disabled"  # disabled | online | offline (kept in run_dir/wandb; `wandb sync` sends it)
    wandb_project: str = "epo_kernels"  # the project that runs are listed in
    wandb_entity: str | None = None  # the team or user it belongs to; null: the account's default
    wandb_name: str | None = None  # the run's name; null: that of run_dir


@dataclass
class TrainConfig:
    run_dir: str = "runs/default"  # the folder everything is written to
    seed: int = 0  # of weights, task choice and every draw
    steps: int = 20  # rollouts, each followed by its updates; more of them extend a run that is there
    schedule_steps: int | None = None  # steps that lr's and penalty's schedules span; null: those the run began with
    resume: str = "auto"  # auto: go on where run_dir stopped | a checkpoint: rewind, or branch | never: a new run_dir
    env: EnvConfig = field(default_factory=EnvConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    @property
    def horizon(self) -> int:
        """The step at which schedules end."""
        return self.schedule_steps or self.steps


def preset_names() -> list[str]:
    folder = files("epo_kernels.train") / "presets"
    return sorted(Path(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(source: str | Sequence[str] | None, overrides: Sequence[str]) -> TrainConfig:
    """Defaults, then the preset and YAML files that `source` names, then `overrides` ("a.b=c").

    A file may name the preset it starts from (`preset: quickstart`). Where a setting's text begins with ~, that is the
    home folder.

    Raises:
        ConfigError: an unknown key or preset, a wrong type, or settings that cannot go together.
    """
    sources = [source] if isinstance(source, str) else list(source or ())
    layers = [*_read_sources(sources), *map(_read_override, overrides)]
    merged: Any = OmegaConf.structured(TrainConfig)
    for layer in layers:
        _check_names(OmegaConf.to_container(layer.settings), TrainConfig, layer)
        try:
            merged = OmegaConf.merge(merged, layer.settings)
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise _setting_error(error, [layer]) from error
    try:
        config: Any = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise _setting_error(error, layers) from error
    _expand_home(config)
    try:
        check(config)
    except ConfigError as error:
        (name,) = re.findall(r"^[\w.]*", str(error))
        raise ConfigError(f"{_place_of(name, layers)}{error}") from error
    return config


def option_as_setting(option: str, following: Sequence[str]) -> str:
    """What to answer to an option that does not exist, such as --steps 5: how the setting meant is written.

    Args:
        option: with its dashes.
        following: the next word of the command line, if there is one.
    """
    given, equals, value = option.lstrip("-").partition("=")
    given, known = given.replace("-", "_"), setting_names()
    if group := [name for name in known if name.startswith(f"{given}.")]:
        return f"unknown option {option}; {given} is a group of settings, written a.b=c: {', '.join(group)}"
    name = given if given in known else _closest(given, known)
    if name is None:
        return (
            f"unknown option {option}; there are --print-config, --dry-run and --help, and settings are written a.b=c"
        )
    if not equals:
        value = following[0] if following and "=" not in following[0] and following[0][:2] != "--" else "VALUE"
    return f"unknown option {option}; settings are written without dashes and spaces: {name}={value}"


def to_yaml(config: TrainConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: TrainConfig) -> dict[str, Any]:
    """{"a.b": value}; lists are leaves."""
    return _flatten(OmegaConf.to_container(OmegaConf.structured(config)))


def read_settings(saved: str) -> dict[str, Any]:
    """{"a.b": value} of a saved config.yaml; what it lacks has its default."""
    return flatten(TrainConfig()) | _flatten(OmegaConf.to_container(OmegaConf.create(saved)))


# What may change when a run is resumed, since it changes nothing that is computed; a name stands for its group too.
OPERATIONAL = (
    "run_dir",
    "resume",
    "steps",
    "env.step_timeout",
    "env.start_timeout",
    "env.max_failures",
    "env.jvm_memory",
    "env.cache_dir",
    "rollout.vllm",
    "optim.max_skipped_updates",
    "evaluate",
    "checkpoint",
    "watch",
    "tracking",
)
# What may change too, since memory or the machine may demand it, but changes how things are batched or summed: the
# same draws and the same mathematics, rounded otherwise.
ROUNDING = (
    "rollout.environments",
    "rollout.cohorts",
    "optim.micro_batch_tokens",
    "optim.packing",
    "model.device",
    "model.threads",
)


def differences(saved: str, config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from a saved config.yaml, {"a.b": (saved, now)}, but for the OPERATIONAL ones.

    A setting that the file lacks, because it is newer, had its default. Of `schedule_steps`, what it comes to counts.
    """
    before, now = read_settings(saved), flatten(config)
    for settings in (before, now):
        settings["schedule_steps"] = settings["schedule_steps"] or settings["steps"]
    return {
        name: (before[name], now.get(name))
        for name in before
        if not is_among(name, OPERATIONAL) and before[name] != now.get(name)
    }


def only_rounding(changed: dict[str, tuple[Any, Any]]) -> bool:
    return all(is_among(name, ROUNDING) for name in changed)


def is_among(name: str, listed: tuple[str, ...]) -> bool:
    """Whether the setting, or a group that it belongs to, is listed."""
    return any(name == entry or name.startswith(f"{entry}.") for entry in listed)


def preset_titles() -> dict[str, str]:
    """{name: what it is}, by each preset's first comment."""
    folder = files("epo_kernels.train") / "presets"
    texts = {name: (folder / f"{name}.yaml").read_text(encoding="utf-8") for name in preset_names()}
    return {name: text.splitlines()[0].removeprefix("# ") for name, text in texts.items()}


def describe_settings() -> str:
    """Every setting with its default and what it means, by groups: the dataclasses' own lines and comments."""
    return "\n".join(_describe(TrainConfig))


PUBLISHED_PROMPT, NEEDED_PROMPT = 2048, 6144


def warnings_of(config: TrainConfig) -> list[str]:
    """Settings that are allowed, but known to hurt."""
    rollout, found = config.rollout, []
    if rollout.response_format == "think_action" and rollout.max_prompt_tokens <= PUBLISHED_PROMPT:
        found.append(
            f"rollout.max_prompt_tokens={rollout.max_prompt_tokens} is the published {PUBLISHED_PROMPT} or less, with "
            f"which its authors' runs crashed on long observations (they went to {NEEDED_PROMPT} later); here such "
            f"prompts lose history and the end of what is seen instead. Set rollout.max_prompt_tokens={NEEDED_PROMPT}"
        )
    if rollout.response_format == "think_action" and rollout.instruction and "<action>" not in rollout.instruction:
        found.append(
            "rollout.instruction doesn't say that an action stands inside <action> </action>, as "
            "rollout.response_format=think_action needs"
        )
    return found


def _describe(group: Any, prefix: str = "") -> list[str]:
    source = inspect.getsource(group)
    lines = []
    for setting in fields(group):
        if is_dataclass(setting.type):
            about = (inspect.getdoc(setting.type) or "").splitlines()[0]
            lines += ["", f"{prefix}{setting.name}: {about}", *_describe(setting.type, f"{prefix}{setting.name}.")]
            continue
        default = setting.default
        if setting.default_factory is not MISSING:
            default = setting.default_factory()
        comment = re.search(rf"^    {setting.name}:.*?  # (.*)$", source, re.MULTILINE)
        lines.append(
            f"  {prefix}{setting.name}={_yaml_value(default)}".ljust(46) + (comment.group(1) if comment else "")
        )
    return lines


def _yaml_value(value: Any) -> str:
    """As YAML and the command line have it: true, null, [a, b]."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("...\n").strip()


def epo_config(config: TrainConfig) -> ek.EPOConfig:
    """The loss's own settings.

    Raises:
        ValueError, TypeError: from EPOConfig's checks.
    """
    names = [f.name for f in fields(ek.EPOConfig) if f.name != "temperature"]
    values = {name: getattr(config.loss, name) for name in names}
    return ek.EPOConfig(**values, temperature=config.rollout.temperature)


_CHOICES = {
    "env.name": ("scienceworld", "alfworld", "practice"),
    "model.dtype": ("float32", "bfloat16"),
    "rollout.engine": ("transformers", "vllm"),
    "rollout.response_format": ("plain", "think_action"),
    "rollout.layout": ("turn", "episode"),
    "algorithm.name": ("grpo", "rloo", "gigpo", "ppo"),
    "algorithm.group_over": ("episodes", "turns"),
    "algorithm.gae": ("turn", "token", "published"),
    "loss.phase_schedule": ("constant", "paper", "official"),
    "loss.history_scope": ("turn", "global"),
    "loss.history_weighting": ("token", "step"),
    "loss.rollout_is": ("auto", "none", "token", "turn"),
    "evaluate.panels": ("iid", "ood", "train"),
    "evaluate.decoding": ("greedy", "sampled"),
    "tracking.wandb": ("disabled", "online", "offline"),
}
_MAPPINGS = ("model.chat_template_kwargs",)  # settings whose value is a mapping with names of its own
_AT_LEAST_ONE = (
    "rollout.environments",
    "rollout.cohorts",
    "rollout.max_prompt_tokens",
    "rollout.max_response_tokens",
    "algorithm.groups",
    "algorithm.group_size",
    "critic.epochs",
    "critic.minibatches",
    "optim.epochs",
    "optim.minibatches",
    "optim.micro_batch_tokens",
    "optim.max_skipped_updates",
    "model.warm_start.epochs",
    "model.warm_start.batch_size",
    "evaluate.episodes",  # for no evaluation: evaluate.panels=[]
    "checkpoint.keep",
    "env.max_failures",
    "watch.patience",
    "loss.rollout_is_cap",
)
_NOT_NEGATIVE = (
    "seed",
    "steps",
    "rollout.history",
    "rollout.history_results",
    "model.threads",
    "model.lora_rank",
    "model.warm_start.demonstrations",
    "algorithm.step_weight",
    "algorithm.invalid_action_penalty",
    "algorithm.kl_reward_coeff",
    "algorithm.refills",
    "critic.minibatch_size",
    "critic.warmup_steps",
    "optim.minibatch_size",
    "optim.weight_decay",
    "evaluate.every",
    "checkpoint.every",
)
_SHARES = (
    "optim.min_lr_ratio",
    "optim.warmup_ratio",
    "watch.uniform_groups",
    "watch.repeated_tokens",
    "watch.valid_actions",
    "algorithm.gamma",
    "algorithm.lam",
)
_BELOW_ONE = ("optim.beta1", "optim.beta2", "rollout.vllm.memory_share")
_POSITIVE = (
    "rollout.vllm.memory_share",
    "rollout.vllm.cpu_cache_gb",
    "optim.lr",
    "optim.max_grad_norm",
    "critic.lr",
    "critic.clip_range",
    "model.lora_alpha",
    "model.warm_start.lr",
)


def check(config: TrainConfig) -> None:
    """Refuse what cannot work, before anything starts.

    Raises:
        ConfigError: naming the settings, what they must be and what they are.
    """
    settings = flatten(config)
    for name, choices in _CHOICES.items():
        given = settings[name]
        for value in given if isinstance(given, list) else [given]:
            _one_of(name, value, choices)
    _check_numbers(settings)
    panels = config.evaluate.panels
    _that(len(set(panels)) == len(panels), f"evaluate.panels names one twice: {panels}")
    try:
        epo_config(config)
    except (TypeError, ValueError) as error:
        message = str(error)
        raise ConfigError(
            message.replace("EPOConfig.temperature", "rollout.temperature").replace("EPOConfig.", "loss.")
        ) from error
    _check_combinations(config)


def _check_numbers(settings: dict[str, Any]) -> None:
    for name in _AT_LEAST_ONE:
        _that(settings[name] >= 1, f"{name} must be at least 1, got {settings[name]}")
    for name in _NOT_NEGATIVE:
        _that(settings[name] >= 0, f"{name} must be at least 0, got {settings[name]}")
    for name in _SHARES:
        _that(0 <= settings[name] <= 1, f"{name} must be in [0, 1], got {settings[name]}")
    for name in _BELOW_ONE:
        _that(0 <= settings[name] < 1, f"{name} must be in [0, 1), got {settings[name]}")
    for name in _POSITIVE:
        _that(0 < settings[name] < math.inf, f"{name} must be positive and finite, got {settings[name]}")


def _check_combinations(config: TrainConfig) -> None:
    rollout, loss, algorithm = config.rollout, config.loss, config.algorithm
    _that(
        algorithm.name == "ppo" or algorithm.group_size >= 2,
        f"algorithm.group_size must be at least 2, got {algorithm.group_size}: {algorithm.name} compares a group's "
        "episodes",
    )
    _that(
        not algorithm.refills or algorithm.group_size >= 2,
        f"algorithm.refills={algorithm.refills} drops groups without spread, which a group of one always is; set "
        "algorithm.group_size to at least 2, or algorithm.refills=0",
    )
    _that(
        algorithm.group_over == "episodes" or algorithm.name in ("grpo", "rloo"),
        f"algorithm.group_over=turns is for grpo and rloo, not for {algorithm.name}",
    )
    _that(
        not (algorithm.kl_reward_coeff and loss.kl_coeff),
        f"algorithm.kl_reward_coeff={algorithm.kl_reward_coeff} and loss.kl_coeff={loss.kl_coeff} count the same KL "
        "twice; set one of them to 0",
    )
    _that(
        rollout.cohorts <= rollout.environments,
        f"rollout.cohorts ({rollout.cohorts}) must not exceed rollout.environments ({rollout.environments})",
    )
    _that(
        0 <= loss.band_low <= loss.band_high,
        f"loss.band_low and loss.band_high must satisfy 0 <= low <= high, got {loss.band_low} and {loss.band_high}",
    )
    _that(
        loss.history_window is None or loss.history_window >= 1,
        f"loss.history_window must be at least 1 or null, got {loss.history_window}",
    )
    _that(
        loss.phase_horizon is None or loss.phase_horizon >= 1,
        f"loss.phase_horizon must be at least 1 or null, got {loss.phase_horizon}",
    )
    _that(
        config.schedule_steps is None or config.schedule_steps >= 1,
        f"schedule_steps must be at least 1 or null, got {config.schedule_steps}",
    )
    _that(
        config.watch.entropy_low < config.watch.entropy_high,
        "watch.entropy_low must be below watch.entropy_high, got "
        f"{config.watch.entropy_low} and {config.watch.entropy_high}",
    )
    _that(
        loss.penalty == "none" or loss.entropy_coeff != 0,
        f"loss.penalty={loss.penalty} has no effect with loss.entropy_coeff=0; set one of them",
    )
    if config.model.name_or_path in FROM_SCRATCH:
        _that(
            config.model.warm_start.demonstrations >= 1,
            f"model.name_or_path={config.model.name_or_path} starts from nothing: model.warm_start.demonstrations "
            "must be at least 1, got 0",
        )
        _that(
            config.model.chat_template is None and not config.model.chat_template_kwargs,
            f"model.name_or_path={config.model.name_or_path} has a chat template of its own: remove "
            "model.chat_template and model.chat_template_kwargs",
        )
    _that(
        not rollout.admissible_actions or config.env.name != "scienceworld",
        "rollout.admissible_actions=true: scienceworld has no such list (hundreds of actions, slow to find); set it "
        "false",
    )
    _that(
        rollout.layout == "turn" or not rollout.goal_last,
        f"rollout.goal_last=true needs rollout.layout=turn, got {rollout.layout}: a dialogue names its goal once, as "
        "it begins",
    )
    _that(
        config.model.warm_start.demonstrations == 0 or rollout.response_format == "plain",
        "model.warm_start clones bare actions: it needs rollout.response_format=plain, or demonstrations=0",
    )
    _that(
        "ood" not in config.evaluate.panels or config.env.name != "scienceworld" or bool(config.env.ood_task_names),
        "evaluate.panels has ood: name its held-out task types in env.ood_task_names",
    )


def _read_sources(sources: list[str]) -> list[Layer]:
    """The preset, then the files."""
    layers, asked = [], {}  # {preset: who asks for it}
    for source in sources:
        if source.endswith((".yaml", ".yml")):
            layers.append(layer := read_settings_file(source))
            try:
                preset = layer.settings.pop("preset", None)
            except OmegaConfBaseException as error:
                raise _setting_error(error, [layer]) from error
            if preset is not None:
                _one_of(f"{layer.where('preset')}preset", str(preset), tuple(preset_names()))
                asked[preset] = source
        elif source in preset_names():
            asked[source] = "the command line"
        else:
            raise ConfigError(_unknown_source(source))
    if len(asked) > 1:
        named = " and ".join(f"{preset} ({by})" for preset, by in asked.items())
        raise ConfigError(f"a run starts from one preset, got {named}; remove all but one")
    folder = files("epo_kernels.train") / "presets"
    texts = {preset: (folder / f"{preset}.yaml").read_text(encoding="utf-8") for preset in asked}
    return [*(parse_settings(text, preset) for preset, text in texts.items()), *layers]


def _unknown_source(word: str) -> str:
    if word in setting_names():
        return f"{word} is a setting; write {word}=VALUE, without spaces"
    return (
        f"no preset {word!r}{_suggest(word, preset_names())}; give one of {', '.join(preset_names())}, a FILE.yaml, or "
        "settings a.b=c"
    )


def _read_override(override: str) -> Layer:
    name, equals, _ = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"{override!r} is no setting; settings are written a.b=c, such as steps=10, without spaces")
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        return Layer(OmegaConf.create(settings), "", dict.fromkeys(_flatten(settings), 1))
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{override!r} is not to be read: {_first_line(error)}") from error


def _check_names(given: Any, group: Any, layer: Layer, prefix: str = "") -> None:
    """Hold names, groups and texts against the dataclass `group`; the values' types are checked when merged."""
    settings = {setting.name: setting.type for setting in fields(group)}
    for name, value in given.items():
        full = f"{prefix}{name}"
        if name not in settings:
            raise ConfigError(layer.where(full) + _unknown_name(full, in_file=bool(layer.name)))
        expected = settings[name]
        if is_dataclass(expected) and isinstance(value, dict):
            _check_names(value, expected, layer, f"{full}.")
        elif is_dataclass(expected):
            parts = ", ".join(setting.name for setting in fields(expected))
            got = "nothing: indent them under it" if value is None else f"the value {_yaml_value(value)}"
            raise ConfigError(f"{layer.where(full)}{full} is a group of settings ({parts}), got {got}")
        elif get_origin(expected) is not dict:
            _check_value(full, value, expected, layer)


def _unknown_name(full: str, in_file: bool) -> str:
    known = setting_names()
    if any(f"{name}.".startswith(f"{full}.") for name in known):  # the dots are in the key itself
        return f"{full} is one key here, and YAML nests groups: write {_nested(full)}"
    close = _closest(full, known)
    written = f" In a file: {_nested(close)}" if in_file and close and close.count(".") > full.count(".") else ""
    return f"unknown setting {full!r}{_suggest(full, known)}{written}"


def _nested(full: str) -> str:
    """a.b as YAML has it: a: {b: ...}."""
    *groups, last = full.split(".")
    return "".join(f"{group}: {{" for group in groups) + f"{last}: ..." + "}" * len(groups)


def _check_value(full: str, value: Any, expected: Any, layer: Layer) -> None:
    """Refuse what OmegaConf would take for a text, or would tell in its own words."""
    if isinstance(value, dict):
        raise ConfigError(
            f"{layer.where(full)}{full} is a setting, not a group: it has no {', '.join(map(repr, value))}"
        )
    parts = value if isinstance(value, list) else [value]
    if str in (expected, *get_args(expected)) and any(isinstance(part, bool) for part in parts):
        choices = f"one of {', '.join(_CHOICES[full])}" if full in _CHOICES else "text, in quotes if need be"
        raise ConfigError(
            f"{layer.where(full)}{full} must be {choices}, got {_yaml_value(value)} (YAML reads on, off, yes and no as "
            "true and false)"
        )


def _setting_error(error: Exception, layers: Sequence[Layer]) -> ConfigError:
    """What OmegaConf says of one setting, with the place of the last layer that gives it."""
    name = getattr(error, "full_key", None) or ""
    reason = _first_line(error)
    if unset := re.search("Environment variable '(.+?)' not found", reason):
        variable = unset.group(1)
        reason = f"the environment variable {variable} is not set; set it, or write ${{oc.env:{variable},DEFAULT}}"
    elif "Incompatible value 'None'" in reason:
        reason = "must have a value, got null (as YAML reads ~ and an empty value)"
    return ConfigError(f"{_place_of(name, layers)}{name}: {reason}" if name else reason)


def _place_of(name: str, layers: Sequence[Layer]) -> str:
    """Where the setting was given last."""
    return next((layer.where(name) for layer in reversed(layers) if name in layer.lines), "")


def _expand_home(group: Any, prefix: str = "") -> None:
    """Replace a leading ~ in every text, in place."""
    for setting in fields(group):
        value = getattr(group, setting.name)
        if is_dataclass(value):
            _expand_home(value, f"{prefix}{setting.name}.")
        elif isinstance(value, str) and value.startswith("~"):
            expanded = os.path.expanduser(value)
            if "/" in value and expanded == value:
                raise ConfigError(f"{prefix}{setting.name}={value}: no home folder is known for {value.split('/')[0]}")
            setattr(group, setting.name, expanded)


def setting_names() -> list[str]:
    """ "a.b" of every setting."""
    return list(flatten(TrainConfig()))


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{name}" not in _MAPPINGS:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _suggest(name: str, known: list[str]) -> str:
    close = _closest(name, known)
    return f"; did you mean {close!r}?" if close else ""


def _closest(name: str, known: list[str]) -> str | None:
    close = get_close_matches(name, known, n=1, cutoff=0.5)
    if not close:  # the right last word under a wrong group
        last = name.rsplit(".", 1)[-1]
        ends = {key.rsplit(".", 1)[-1]: key for key in known}
        close = [ends[end] for end in get_close_matches(last, list(ends), n=1, cutoff=0.7)]
    return close[0] if close else None


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    hint = _suggest(value, list(choices))
    _that(value in choices, f"{name} must be one of {', '.join(choices)}, got {value!r}{hint}")


def _that(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ConfigError(otherwise)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
