"""Row kernels in eager PyTorch, with the closed form of the gradient: in float64, what surrounds kernels is exact."""

import torch
from torch import Tensor

from epo_kernels import reference
from epo_kernels.backends.fused import PlainHelpers
from epo_kernels.backends.rows import COEFFICIENTS, ROW_SUMS, RowLoss, Rows, RowStatistics, Terms
from epo_kernels.config import EPOConfig
from epo_kernels.inputs import Coefficients, TokenInputs


class EagerRows(PlainHelpers):
    def statistics(self, rows: Rows, *, entropy: bool) -> RowStatistics:
        with torch.no_grad():
            log_probs, entropies = _statistics(rows, rows.logits)
        unused = torch.full_like(log_probs, float("nan"))
        return RowStatistics(log_probs, entropies if entropy else None, unused, unused)

    def gradient(
        self,
        rows: Rows,
        statistics: RowStatistics,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        if grad_entropy is None:
            grad_entropy = torch.zeros_like(grad_log_probs)
        out.copy_(_gradient(rows, grad_log_probs, grad_entropy))

    def loss(self, rows: Rows, terms: Terms, out: Tensor | None) -> RowLoss:
        inputs, coefficients, cfg = _arguments(rows, terms)
        with torch.enable_grad():
            log_probs, entropy = (value.requires_grad_() for value in _statistics(rows, rows.logits.detach()))
            losses = reference.token_losses(log_probs, entropy, inputs, coefficients, cfg)
            loss = (terms.weights * losses.total).sum()
        if out is not None:
            upstream = torch.autograd.grad(loss, (log_probs, entropy), materialize_grads=True)
            out.copy_(_gradient(rows, *upstream) * terms.gradient_scale)
        sums = {
            "tokens": rows.mask,
            "loss": terms.weights * losses.total,
            "pg_loss": terms.weights * losses.pg,
            "penalty": terms.weights * losses.band.penalty,
            "kl_loss": terms.weights * losses.kl,
            "entropy_sum": entropy,
            "log_prob_sum": log_probs,
            "ratio_sum": losses.policy.ratio,
            "ppo_kl_sum": -losses.policy.log_ratio,
            "clipped_tokens": losses.policy.clipped,
            "dual_clipped_tokens": losses.policy.dual_clipped,
            "below_band_tokens": losses.band.below,
            "above_band_tokens": losses.band.above,
            "nonfinite_tokens": ~torch.isfinite(losses.total),
            "invalid_tokens": (rows.tokens < 0) | (rows.tokens >= rows.transform.vocab_size),
        }
        values = [sums[name].detach().sum(dtype=torch.float64) for name in ROW_SUMS]
        return RowLoss(log_probs.detach(), entropy.detach(), torch.stack(values), loss.detach())


def _gradient(rows: Rows, grad_log_probs: Tensor, grad_entropy: Tensor) -> Tensor:
    """The closed form: (∂z/∂x) (a (1[v = y] - p_v) - b p_v (log p_v + H)) for raw logits x; no autograd in it."""
    z = reference.transform_logits(rows.logits, rows.transform)
    log_p = torch.log_softmax(z, dim=-1)
    p = log_p.exp()
    entropy = -(p * log_p).sum(dim=-1, keepdim=True)
    a, b = grad_log_probs[..., None], grad_entropy[..., None]
    grad_z = -a * p - b * p * (log_p + entropy)
    grad_z.scatter_add_(-1, rows.tokens[..., None], a)
    x, transform = rows.logits[..., : z.shape[-1]].to(z.dtype), rows.transform
    slope = torch.full_like(z, 1.0 if transform.scale is None else transform.scale)
    if transform.softcap is not None:
        slope = slope * (1 - torch.tanh(x * slope / transform.softcap).square())
    temperature = transform.temperature
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        temperature = temperature[..., None]
    gradient = torch.zeros(rows.logits.shape, dtype=z.dtype)
    gradient[..., : z.shape[-1]] = grad_z * slope / temperature
    return gradient


def _statistics(rows: Rows, logits: Tensor) -> tuple[Tensor, Tensor]:
    return reference.masked_log_probs_and_entropy(logits, rows.transform, rows.tokens, rows.mask)


def _arguments(rows: Rows, terms: Terms) -> tuple[TokenInputs, Coefficients, EPOConfig]:
    assert bool(rows.mask.all()), "a head's rows are all counted"
    values = dict(zip(COEFFICIENTS, terms.coefficients.tolist(), strict=True))
    cfg = EPOConfig(
        clip_ratio_low=values["clip_ratio_low"],
        clip_ratio_high=values["clip_ratio_high"],
        clip_ratio_c=None if values["clip_ratio_c"] == float("inf") else values["clip_ratio_c"],
        kl_type=terms.kl_type,
        penalty=terms.penalty,
        penalty_alpha=values["penalty_alpha"],
    )
    inputs = TokenInputs(
        shape=rows.tokens.shape,
        tokens=rows.tokens,
        mask=rows.mask,
        old_log_probs=terms.old_log_probs,
        advantages=terms.advantages,
        ref_log_probs=terms.ref_log_probs,
        is_weights=terms.is_weights,
        lower=terms.lower,
        upper=terms.upper,
        segment_ids=None,
        num_segments=0,
        sequence_ids=None,
        num_sequences=1,
        max_length=None,
    )
    coefficients = Coefficients(values["entropy_coeff"], values["penalty_coeff"], values["kl_coeff"], None, 1.0)
    return inputs, coefficients, cfg
