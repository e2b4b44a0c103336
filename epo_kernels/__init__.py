"""Fused entropy-regularized policy-gradient losses for training LLM agents."""

from epo_kernels.backends import available_backends
from epo_kernels.config import EPOConfig
from epo_kernels.functional import epo_loss, log_probs_and_entropy
from epo_kernels.history import EntropyHistory
from epo_kernels.metrics import LossMetrics
from epo_kernels.reference import EPOOutput
from epo_kernels.schedule import phase_weight

__all__ = [
    "EPOConfig",
    "EPOOutput",
    "EntropyHistory",
    "LossMetrics",
    "available_backends",
    "epo_loss",
    "log_probs_and_entropy",
    "phase_weight",
]
