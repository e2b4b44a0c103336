"""The policy before RL: loaded or built, cloned from demonstrations, given adapters, and distributed to every rank."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from epo_kernels.train.config import FROM_SCRATCH, ConfigError, TrainConfig
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.envs import Demonstration, Suite
from epo_kernels.train.envs.demonstrations import frozen_folder, read_frozen
from epo_kernels.train.header import about_policy
from epo_kernels.train.io.display import Display
from epo_kernels.train.io.stopping import StopRequest
from epo_kernels.train.models.loader import PolicyLoader
from epo_kernels.train.models.lora import add_adapters
from epo_kernels.train.models.policy import Policy, build_from_scratch, load_policy, precision
from epo_kernels.train.rl.warm_start import clone, cloning_samples, demonstrate
from epo_kernels.train.rollout.dialogue import make_prompts


@dataclass
class Start:
    """Creates the starting policy of a run without a checkpoint."""

    config: TrainConfig
    suite: Suite
    loader: PolicyLoader
    display: Display
    stop: StopRequest
    dry: bool  # read at most one demonstration, clone nothing and write nothing

    def __post_init__(self) -> None:
        self._from_scratch = self.config.model.name_or_path in FROM_SCRATCH

    def policy(self, ranks: Ranks) -> Policy:
        """The starting policy on every rank.

        A pretrained model without cloning is read by each rank. Any other is created by the first rank and saved for
        the others to read.
        """
        model = self.config.model
        if ranks.fsdp and not self._from_scratch and not model.warm_start.demonstrations:
            return self._with_adapters(self.loader.load(model.name_or_path))
        if self.dry or ranks.size == 1:
            return self._make()
        folder = Path(self.config.run_dir) / "start"
        if ranks.is_first:
            self._make().save(folder)
        ranks.wait()
        policy = self.loader.load(folder)
        ranks.wait()
        if ranks.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        return policy

    def _make(self) -> Policy:
        model, seed = self.config.model, self.config.seed
        if self._from_scratch:
            demonstrations = self._demonstrations()
            policy = self.loader.checked(build_from_scratch(demonstrations, model, seed), model.name_or_path)
        else:  # load the model first: demonstrations take minutes, and it may be unusable
            policy = self.loader.load(model.name_or_path, whole=True)
            demonstrations = self._demonstrations()
        if demonstrations and not self.dry:
            self._clone(policy, demonstrations)
        if model.lora_rank and not self.dry and (self._from_scratch or demonstrations):
            policy = self._as_base(policy)
        return self._with_adapters(policy)

    def _demonstrations(self) -> list[Demonstration]:
        count = self.config.model.warm_start.demonstrations
        count = min(count, 1) if self.dry else count
        if not count:
            return []
        if frozen := self.config.model.warm_start.frozen:
            folder = frozen_folder(frozen)
            self.display.say(f"demonstrations: {count} episodes of {folder}")
            try:
                return read_frozen(folder, count)
            except ValueError as error:
                raise ConfigError(f"model.warm_start.frozen: {error}") from error
        self.display.say(f"demonstrations: {count} episodes of {self.suite.name}")
        with self.display.bar("demonstrations", count, "episodes", self.stop.check) as report:
            return demonstrate(self.suite, count, report)

    def _clone(self, policy: Policy, demonstrations: list[Demonstration]) -> None:
        """Train the policy on the demonstrations, in place."""
        config, say = self.config, self.display.say
        epochs = config.model.warm_start.epochs
        prompts = make_prompts(policy.chat, config.rollout)
        limit = config.rollout.max_response_tokens
        samples = cloning_samples(demonstrations, policy, prompts, limit, config.rollout.layout)
        said = f"{len(samples)} {'episodes' if config.rollout.layout == 'episode' else 'turns'} for {epochs} epochs"
        say(f"cloning: {said}; {about_policy(policy)}")
        with (
            self.display.bar("cloning", epochs, "epochs", self.stop.check) as report,
            precision(policy.model, config.model.dtype),
        ):
            losses = clone(policy, samples, config.model.warm_start, config.seed, report)
        say(f"cloned {said}: loss {losses[0]:.3f} to {losses[-1]:.3f}")

    def _as_base(self, policy: Policy) -> Policy:
        """The policy, saved to and reloaded from run_dir/base: checkpoints contain only adapters and refer to it."""
        base = (Path(self.config.run_dir) / "base").resolve()
        policy.save(base)
        return load_policy(str(base), self.config.model)

    def _with_adapters(self, policy: Policy) -> Policy:
        if self.config.model.lora_rank:
            if not self._from_scratch:  # building from scratch has already seeded
                torch.manual_seed(self.config.seed)
            add_adapters(policy.model, self.config.model)
        return policy
