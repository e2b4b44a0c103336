"""Loads a run's policies, sharded over its ranks if requested, and checks them against its settings."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from epo_kernels.train.config import ConfigError, TrainConfig
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.io.display import Display
from epo_kernels.train.models.check import check_policy
from epo_kernels.train.models.loading import hold_products_in
from epo_kernels.train.models.policy import Policy, load_policy


@dataclass
class PolicyLoader:
    """Reads and checks policies for a run."""

    config: TrainConfig
    ranks: Ranks
    display: Display

    def load(self, source: str | Path, whole: bool = False) -> Policy:
        """The policy to train, from a folder or the Hub. Under `model.fsdp` each rank reads its shards, unless `whole`.

        Raises:
            ConfigError: it cannot be loaded or trained with these settings.
        """
        return self.checked(self._read(source, self.ranks.fsdp and not whole), str(source))

    def load_frozen(self, source: str | Path) -> PreTrainedModel:
        """A model that is not trained; its linear layers have the dtype of matrix products (`hold_products_in`)."""
        return self._read(source, self.ranks.fsdp, frozen=True).model.requires_grad_(False)

    def checked(self, policy: Policy, source: str) -> Policy:
        """The policy, after checking that it supports the settings; prints warnings.

        Raises:
            ConfigError: it does not.
        """
        try:
            for warning in check_policy(policy, self.config):
                self.display.say(f"warning: {source}: {warning}")
        except ConfigError as error:
            raise ConfigError(f"model.name_or_path={source}: {error}") from error
        return policy

    def _read(self, source: str | Path, split: bool, frozen: bool = False) -> Policy:
        dtype = getattr(torch, self.config.model.dtype)
        narrow = frozen and dtype != torch.float32

        def prepare(model: PreTrainedModel, device: torch.device) -> None:
            if frozen:
                model.requires_grad_(False)
            if narrow:
                hold_products_in(model, dtype)
            if split:
                self.ranks.shard(model.get_decoder(), device)

        with self.display.bar(f"loading {source}", None):
            early = prepare if split or narrow else None
            return load_policy(str(source), self.config.model, early, self.display.say)
