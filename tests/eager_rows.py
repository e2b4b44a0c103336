"""Row kernels in eager PyTorch, by autograd through the reference: in float64, the ways around kernels are exact."""

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
        with torch.enable_grad():
            leaf = rows.logits.detach().clone().requires_grad_()
            log_probs, entropy = _statistics(rows, leaf)
            total = (log_probs * grad_log_probs).sum()
            if grad_entropy is not None:
                total = total + (entropy * grad_entropy).sum()
            out.copy_(torch.autograd.grad(total, leaf)[0])

    def loss(self, rows: Rows, terms: Terms, out: Tensor | None) -> RowLoss:
        with torch.enable_grad():
            leaf = rows.logits.detach().clone().requires_grad_()
            log_probs, entropy = _statistics(rows, leaf)
            inputs, coefficients, cfg = _arguments(rows, terms)
            losses = reference.token_losses(log_probs, entropy, inputs, coefficients, cfg)
            loss = (terms.weights * losses.total).sum()
            if out is not None:
                out.copy_(torch.autograd.grad(loss * terms.gradient_scale, leaf)[0])
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
