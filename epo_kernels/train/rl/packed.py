"""The samples of a training step as one packed batch, for what the library computes of tokens, turns and episodes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from epo_kernels.train.data import Sample


@dataclass(frozen=True)
class PackedSamples:
    """N tokens of S samples, one sample after the other.

    Attributes:
        segment_ids: (N,) int64: each turn of each sample has its own number; of no meaning where the mask is False.
    """

    mask: Tensor  # (N,) bool: what the policy wrote
    segment_ids: Tensor
    lengths: list[int]  # tokens of each sample

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> "PackedSamples":
        lengths = [len(sample.turns) for sample in samples]
        owners = torch.arange(len(samples)).repeat_interleave(torch.tensor(lengths))
        turns = torch.tensor([turn for sample in samples for turn in sample.turns])
        _, segment_ids = torch.stack([owners, turns]).unique(dim=1, return_inverse=True)
        return cls(torch.cat([sample.mask for sample in samples]), segment_ids, lengths)

    @property
    def cu_seqlens(self) -> Tensor:
        """(S + 1,) int64: where each sample begins, and the last one ends."""
        return torch.tensor([0, *self.lengths]).cumsum(0)

    def split(self, values: Tensor) -> list[Tensor]:
        """(N,) values by sample, each a tensor of its own."""
        return [own.clone() for own in values.split(self.lengths)]
