"""Row kernels in eager PyTorch, with the closed form of the gradient: float64 makes the code around them exact."""

import torch
from torch import Tensor

from epo_kernels import EPOConfig, reference
from epo_kernels.declaration import COEFFICIENTS
from epo_kernels.fused.backend import PlainHelpers
from epo_kernels.fused.linear import loss_of_statistics
from epo_kernels.fused.rows import RowLoss, Rows, RowStatistics, Terms
from epo_kernels.inputs import Aggregation, Coefficients, LogitTransform, LossInputs, Scalar, TokenInputs


class EagerRows(PlainHelpers):
    def statistics(self, rows: Rows, *, entropy: bool) -> RowStatistics:
        with torch.no_grad():
            z = _z(rows)
            inputs = TokenInputs(rows.mask.shape, rows.transform, rows.tokens, rows.mask, None)
            log_probs, entropies = reference.masked_log_probs_and_entropy(rows.logits, inputs)
            maximum = z.amax(dim=-1)
            base = torch.where(maximum == -torch.inf, 0.0, maximum)
            total = (z - base[..., None]).exp().sum(dim=-1)
        return RowStatistics(log_probs, entropies if entropy else None, maximum, total)

    def gradient(
        self,
        rows: Rows,
        statistics: RowStatistics,
        grad_log_probs: Tensor,
        grad_entropy: Tensor | None,
        out: Tensor,
    ) -> None:
        """The closed form: (∂z/∂x) (a (1[v = y] - p_v) - b p_v (log p_v + H)) for raw logits x; no autograd in it."""
        with torch.no_grad():
            z, transform = _z(rows), rows.transform
            log_p = z - statistics.maximum[..., None] - statistics.sum.log()[..., None]
            p = log_p.exp()
            a = torch.where(statistics.log_probs.isnan(), torch.nan, grad_log_probs)[..., None]
            grad_z = a * ((rows.tokens[..., None] == torch.arange(z.shape[-1])).to(z.dtype) - p)
            if grad_entropy is not None:
                assert statistics.entropy is not None
                surprise = log_p.masked_fill(p == 0, 0.0) + statistics.entropy[..., None]
                grad_z -= grad_entropy[..., None] * p * surprise
            slope = torch.full_like(z, 1.0 if transform.scale is None else transform.scale)
            if transform.softcap is not None:
                x = rows.logits[..., : z.shape[-1]].to(z.dtype)
                slope = slope * (1 - torch.tanh(x * slope / transform.softcap).square())
            temperature = transform.temperature
            if isinstance(temperature, Tensor) and temperature.dim() > 0:
                temperature = temperature[..., None]
            out.zero_()
            out[..., : z.shape[-1]] = torch.where(rows.mask[..., None], grad_z * slope / temperature, 0.0)

    def loss(self, rows: Rows, terms: Terms, out: Tensor | None) -> RowLoss:
        statistics = self.statistics(rows, entropy=True)
        result, grad_log_probs, grad_entropy = loss_of_statistics(statistics, _inputs(rows, terms), terms.weights)
        if out is not None:
            self.gradient(rows, statistics, grad_log_probs, grad_entropy, out)
        return result

    def maximum_scale(self, transform: LogitTransform) -> Scalar:
        return 1.0  # maxima are those of z itself


def _inputs(rows: Rows, terms: Terms) -> LossInputs:
    """The loss described by the terms, as inputs of the reference."""
    given = dict(zip(COEFFICIENTS, terms.coefficients.tolist(), strict=True))
    policy_loss, _, divergence = terms.policy_loss.partition("_")
    fields = {name: value for name, value in given.items() if not name.endswith("_coeff")}
    cfg = EPOConfig(
        **{**fields, "clip_ratio_c": None if given["clip_ratio_c"] == float("inf") else given["clip_ratio_c"]},
        policy_loss=policy_loss,
        dppo_divergence=divergence or "tv",
        penalty=terms.penalty,
        kl_type=terms.kl_type,
    )
    return LossInputs(
        shape=rows.mask.shape,
        transform=rows.transform,
        tokens=rows.tokens,
        mask=rows.mask,
        invalid=None,
        cfg=cfg,
        coefficients=Coefficients(given["entropy_coeff"], given["penalty_coeff"], given["kl_coeff"]),
        aggregation=Aggregation("token-mean", None, rows.mask.shape[0]),
        old_log_probs=terms.old_log_probs,
        advantages=terms.advantages,
        ref_log_probs=terms.ref_log_probs,
        is_weights=terms.is_weights,
        lower=terms.lower,
        upper=terms.upper,
        segment_ids=None,
        num_segments=0,
    )


def _z(rows: Rows) -> Tensor:
    return reference.transform_logits(rows.logits, rows.transform)
