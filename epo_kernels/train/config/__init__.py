"""The driver's settings: `groups` declares and checks them, `load` reads and merges them, `resume` compares them."""

from epo_kernels.train.config.describe import describe_settings, option_as_setting, preset_titles
from epo_kernels.train.config.groups import (
    FROM_SCRATCH,
    AlgorithmConfig,
    CheckpointConfig,
    CriticConfig,
    EvaluateConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    TrackingConfig,
    TrainConfig,
    VllmConfig,
    WarmStartConfig,
    WatchConfig,
    epo_config,
)
from epo_kernels.train.config.load import load_config
from epo_kernels.train.config.loss import LossConfig
from epo_kernels.train.config.presets import preset_names
from epo_kernels.train.config.resume import differences, is_among, only_rounding, read_settings
from epo_kernels.train.config.tree import flatten, to_yaml
from epo_kernels.train.setting import ConfigError
