"""Row kernels in eager PyTorch, with the closed form of the gradient: in float64, what surrounds kernels is exact."""

import torch
from torch import Tensor

from epo_kernels import reference
from epo_kernels.fused.backend import PlainHelpers
from epo_kernels.fused.rows import RowLoss, Rows, RowStatistics, Terms
from epo_kernels.fused.sharded import loss_of_rows
from epo_kernels.inputs import LogitTransform, Scalar


class EagerRows(PlainHelpers):
    def statistics(self, rows: Rows, *, entropy: bool) -> RowStatistics:
        with torch.no_grad():
            z = _z(rows)
            log_probs, entropies = reference.masked_log_probs_and_entropy(
                rows.logits, rows.transform, rows.tokens, rows.mask
            )
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
        result, grad_log_probs, grad_entropy = loss_of_rows(rows, statistics, terms)
        if out is not None:
            self.gradient(rows, statistics, grad_log_probs, grad_entropy, out)
        return result

    def rate(self, transform: LogitTransform) -> Scalar:
        return 1.0  # maxima are those of z itself


def _z(rows: Rows) -> Tensor:
    return reference.transform_logits(rows.logits, rows.transform)
