"""Fused entropy-regularized policy-gradient losses for training LLM agents."""

from epo_kernels.backends import available_backends
from epo_kernels.config import EPOConfig
from epo_kernels.controller import EntropyController
from epo_kernels.functional import (
    distribution_statistics,
    epo_loss,
    epo_loss_from_log_probs,
    linear_distribution_statistics,
    linear_epo_loss,
    linear_log_probs_and_entropy,
    log_probs_and_entropy,
)
from epo_kernels.history import EntropyHistory
from epo_kernels.metrics import LossMetrics
from epo_kernels.mismatch import rollout_weights
from epo_kernels.modules import EPOLoss, LinearEPOLoss
from epo_kernels.reference import DistributionStatistics, EPOOutput
from epo_kernels.schedule import phase_weight
from epo_kernels.shaping import shape_advantages

__version__ = "0.1.0"

__all__ = [
    "DistributionStatistics",
    "EPOConfig",
    "EPOLoss",
    "EPOOutput",
    "EntropyController",
    "EntropyHistory",
    "LinearEPOLoss",
    "LossMetrics",
    "__version__",
    "available_backends",
    "distribution_statistics",
    "epo_loss",
    "epo_loss_from_log_probs",
    "linear_distribution_statistics",
    "linear_epo_loss",
    "linear_log_probs_and_entropy",
    "log_probs_and_entropy",
    "phase_weight",
    "rollout_weights",
    "shape_advantages",
]
