"""Constructs and connects the parts of a run: new, resumed from its last checkpoint, or branched from another run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import torch

import epo_kernels as ek
from epo_kernels.history import HistoryScope, HistoryWeighting
from epo_kernels.train.config import ConfigError, TrainConfig, to_yaml
from epo_kernels.train.distributed import Ranks
from epo_kernels.train.envs import Suite, Task, make_suite
from epo_kernels.train.envs.demonstrations import borrow_cache
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.header import about_policy, about_tasks, opening
from epo_kernels.train.io.checkpoint import drop_later_checkpoints, room_warning
from epo_kernels.train.io.display import Display
from epo_kernels.train.io.resume import find_origin, keep_horizon, note_branch, review_differences, start_of
from epo_kernels.train.io.run_dir import check_usable, clear_records, copy_records, held
from epo_kernels.train.io.stopping import Stopped, StopRequest
from epo_kernels.train.io.tracking import Tracker, read_metrics, write_atomically
from epo_kernels.train.io.watch import watched
from epo_kernels.train.io.weights_and_biases import WeightsAndBiases, require_wandb
from epo_kernels.train.models.loader import PolicyLoader
from epo_kernels.train.models.lora import require_peft
from epo_kernels.train.models.policy import Policy
from epo_kernels.train.models.reference import reference_model
from epo_kernels.train.parts import Parts
from epo_kernels.train.rl.collect import Collector
from epo_kernels.train.rl.critic import Critic
from epo_kernels.train.rl.learner import Learner
from epo_kernels.train.rollout.dialogue import make_prompts
from epo_kernels.train.rollout.engine import Engine, StopRule, StreamingEngine, TransformersEngine
from epo_kernels.train.rollout.rollout import Rollout
from epo_kernels.train.rollout.shared import SharedRollout
from epo_kernels.train.rollout.vllm_engine import VllmEngine, require_vllm
from epo_kernels.train.setting import require
from epo_kernels.train.start import Start


@contextmanager
def build(
    config: TrainConfig,
    display: Display,
    dry: bool = False,
    stop: StopRequest | None = None,
    ranks: Ranks | None = None,
) -> Iterator[Parts]:
    """The parts of a run, open inside the `with`: environments may be processes, and the run's folder is locked.

    Args:
        dry: build everything without cloning or training, and write nothing.
        stop: checked at every progress update; raises if the run was asked to stop.
        ranks: the processes that train together, of which the first writes the run's folder; None: only this process.

    Raises:
        ConfigError: the settings do not fit the environment, the model, or the run to continue.
    """
    with ExitStack() as stack:
        yield _Builder(config, display, dry, stop or StopRequest(), ranks or Ranks(), stack).parts()


@dataclass
class _Builder:
    """One call of `build`. Everything it opens is closed by `stack`, even if a later part fails."""

    config: TrainConfig
    display: Display
    dry: bool
    stop: StopRequest
    ranks: Ranks
    stack: ExitStack

    def __post_init__(self) -> None:
        config = self.config
        require_peft(config.model)
        require_wandb(config.tracking)
        require_vllm(config.rollout)
        if config.model.threads:
            torch.set_num_threads(config.model.threads)
        self._run_dir = Path(config.run_dir)
        self._take_folder()
        self._origin = find_origin(config)
        self._start = self._first_step()
        if not self.ranks.is_first:  # a temporary folder that nobody reads
            self._run_dir = copy_records(self._run_dir, Path(self.stack.enter_context(TemporaryDirectory())))
        self.ranks.wait()  # the first rank changes the run's folder from here on
        self.config = self._continued(config)

    def parts(self) -> Parts:
        config, display, ranks = self.config, self.display, self.ranks
        display.say(opening(config, ranks))
        suite = self._suite()
        tasks = _tasks(suite, "train")
        panels = {panel: _tasks(suite, panel)[: config.evaluate.episodes] for panel in config.evaluate.panels}
        suite.close()  # the simulator used to list them
        display.say(about_tasks(suite, tasks, panels, config))

        loader = PolicyLoader(config, ranks, display)
        policy = self._policy(suite, loader)
        display.say(about_policy(policy))
        with display.bar("starting the engine", None):
            engine = self._engine(policy)
        rollout = self._rollout(suite, policy, engine)
        if not self.dry:
            self._clean_folder()
        reference = None if self.dry else reference_model(policy, self._origin, config, ranks, loader, display.say)
        parts = Parts(
            config=config,
            ranks=ranks,
            display=display,
            run_dir=self._run_dir,
            suite=suite,
            tasks=tasks,
            panels=panels,
            policy=policy,
            engine=engine,
            rollout=rollout,
            collector=Collector(tasks, rollout, config),
            history=_history(suite, config),
            critic=Critic(policy, config, ranks) if config.algorithm.name == "ppo" else None,
            learner=Learner(policy, reference, config, ranks),
            start=self._start,
            step=0,
        )
        if self._origin:
            parts.restore(self._origin)
        self._warn_of_room(parts)
        if not self.dry:
            parts.save()  # saves the starting weights: a run killed from here on continues from them
            self._open_records(parts)
        return parts

    def _take_folder(self) -> None:
        """Check the run's folder, and lock it."""

        def take() -> None:
            check_usable(self._run_dir)
            if not self.dry:
                self.stack.enter_context(held(self._run_dir, self.display.say))

        self.ranks.on_first(take)

    def _first_step(self) -> int:
        if self._origin is None:
            return 0
        return self._origin.step if self._origin.is_branch else start_of(self._run_dir)

    def _continued(self, config: TrainConfig) -> TrainConfig:
        """The settings, after comparison with the checkpoint's."""
        if origin := self._origin:
            saved = origin.state["config"]
            config = keep_horizon(saved, config)
            for text in review_differences(saved, config, origin.step, origin.is_branch):
                self.display.say(text)
        return config

    def _suite(self) -> Suite:
        environment = self.config.env
        if self.dry:  # missing cache entries are created only for this call
            folder = self.stack.enter_context(TemporaryDirectory())
            environment = replace(environment, cache_dir=borrow_cache(environment.cache_dir, folder))
        try:
            suite = make_suite(environment)
        except (ImportError, ValueError) as error:
            raise ConfigError(str(error)) from error
        self.stack.callback(suite.close)
        return suite

    def _policy(self, suite: Suite, loader: PolicyLoader) -> Policy:
        if self._origin:
            return loader.load(self._origin.checkpoint / "actor")
        return Start(self.config, suite, loader, self.display, self.stop, self.dry).policy(self.ranks)

    def _engine(self, policy: Policy) -> Engine | StreamingEngine:
        rollout = self.config.rollout
        stop = StopRule(policy.tokenizer, policy.end_ids, rollout.response_format, policy.chat.opening)
        if rollout.engine == "transformers":
            limit = rollout.max_response_tokens
            return TransformersEngine(policy.model, policy.pad_id, stop, rollout.temperature, limit)
        engine = VllmEngine(policy, stop, self.config)
        self.stack.callback(engine.close)
        return engine

    def _rollout(self, suite: Suite, policy: Policy, engine: Engine | StreamingEngine) -> SharedRollout:
        env, rollout = self.config.env, self.config.rollout
        pool = EnvironmentPool(
            suite,
            rollout.environments,
            step_timeout=env.step_timeout,
            start_timeout=env.start_timeout,
            max_failures=env.max_failures,
        )
        self.stack.callback(pool.close)
        own = Rollout(
            pool,
            policy,
            engine,
            make_prompts(policy.chat, rollout),
            max_turns=suite.max_turns,
            cohorts=rollout.cohorts,
            response_format=rollout.response_format,
        )
        return SharedRollout(own, self.ranks, None if isinstance(engine, StreamingEngine) else policy.model)

    def _clean_folder(self) -> None:
        """Remove everything from the run's folder that the coming steps will write."""
        origin = self._origin
        if origin is None or origin.is_branch:
            clear_records(self._run_dir)
        if origin:
            if origin.is_branch:
                note_branch(self._run_dir, origin.checkpoint)
            drop_later_checkpoints(self._run_dir / "checkpoints", origin.step)

    def _warn_of_room(self, parts: Parts) -> None:
        parameters = list(parts.policy.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        other = 0 if self.config.model.lora_rank else sum(p.numel() for p in parameters) - trained
        if parts.critic:
            trained *= 2  # its backbone is a copy of the policy's
        warning = room_warning(self._run_dir / "checkpoints", trained, other, self.config.checkpoint.keep)
        if warning and self.ranks.is_first:
            self.display.say(f"warning: {warning}")

    def _open_records(self, parts: Parts) -> None:
        """Open the tracker, replay earlier steps to the collapse watch, and write config.yaml."""
        config, say = self.config, self.display.say
        is_shown = config.tracking.wandb != "disabled" and self.ranks.is_first
        boards = [WeightsAndBiases(self._run_dir, config, say)] if is_shown else []
        tracker = Tracker(self._run_dir, parts.step, *boards)
        self.stack.push(lambda _, error, __: tracker.close(failed=error is not None and not isinstance(error, Stopped)))
        tracker.extend(config.steps)
        if tracker.lost:
            say(f"warning: metrics.jsonl was damaged and has been repaired; steps {tracker.lost} are missing")
        parts.tracker = tracker
        parts.watch, _ = watched(read_metrics(self._run_dir), config.watch)
        write_atomically(self._run_dir / "config.yaml", to_yaml(config))


def _tasks(suite: Suite, split: str) -> list[Task]:
    try:
        tasks = suite.tasks(split)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    require(bool(tasks), f"env.name={suite.name} has no tasks in its split {split!r}; check env.options")
    return tasks


def _history(suite: Suite, config: TrainConfig) -> ek.EntropyHistory:
    return ek.EntropyHistory(
        suite.max_turns,
        config.loss.history_window,
        cast(HistoryScope, config.loss.history_scope),
        cast(HistoryWeighting, config.loss.history_weighting),
    )
