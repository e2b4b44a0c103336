"""The training loop, to be read from top to bottom."""

import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from transformers import PreTrainedModel

import epo_kernels as ek
from epo_kernels.history import HistoryScope, HistoryWeighting
from epo_kernels.train.config import FROM_SCRATCH, ConfigError, TrainConfig, to_yaml
from epo_kernels.train.data import Draw, samples_of
from epo_kernels.train.distributed import Ranks, SharedRollout
from epo_kernels.train.envs import EnvironmentFailure, make_suite
from epo_kernels.train.envs.demonstrations import borrow_cache
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.evaluate import Record, panel_starts, summarize
from epo_kernels.train.header import about_policy, about_tasks, opening
from epo_kernels.train.io.checkpoint import (
    clear_run,
    copy_records,
    drop_later_checkpoints,
    find_checkpoint,
    is_foreign,
    keep_horizon,
    load_state,
    note_branch,
    review_differences,
    rng_state,
    room_warning,
    save_checkpoint,
    set_rng_state,
    start_of,
)
from epo_kernels.train.io.failures import RunError
from epo_kernels.train.io.progress import Report
from epo_kernels.train.io.report import write_report
from epo_kernels.train.io.run_dir import check_usable, held
from epo_kernels.train.io.stopping import Stopped, StopRequest
from epo_kernels.train.io.tracking import Display, Tracker, Value, read_metrics, write_atomically
from epo_kernels.train.io.watch import CollapsedError, watched
from epo_kernels.train.io.weights_and_biases import WeightsAndBiases, require_wandb
from epo_kernels.train.models.check import check_policy
from epo_kernels.train.models.loading import hold_products_in
from epo_kernels.train.models.lora import add_adapters, require_peft
from epo_kernels.train.models.policy import Policy, build_from_scratch, load_policy, precision
from epo_kernels.train.rl.algorithms import assign_advantages, leave_out_truncated
from epo_kernels.train.rl.critic import Critic
from epo_kernels.train.rl.learner import Learner
from epo_kernels.train.rl.metrics import entropy_metrics, episode_metrics, sampled_entropy, token_metrics
from epo_kernels.train.rl.mismatch import mismatch_metrics, rollout_is_level, set_rollout_weights
from epo_kernels.train.rl.post_mortem import NonFiniteError, save_batch
from epo_kernels.train.rl.warm_start import clone, cloning_samples, demonstrate
from epo_kernels.train.rollout.collect import Collector
from epo_kernels.train.rollout.dialogue import DialogueBuilder
from epo_kernels.train.rollout.engine import Engine, StopRule, StreamingEngine, TransformersEngine
from epo_kernels.train.rollout.prompts import PromptBuilder, Prompts
from epo_kernels.train.rollout.rollout import Rollout
from epo_kernels.train.rollout.vllm_engine import VllmEngine, require_vllm


class Trainer:
    """Everything a run needs, built and connected. Close it (or use `with`): environments may be processes.

    Args:
        config: checked.
        display: where progress shows.
        dry: build all parts without training any (no cloning) and write nothing.
        stop: asked at every move of a bar, and before each step, whether to go on.
        ranks: the processes that train together, of which the first writes the run's folder; None: this one alone.

    Raises:
        ConfigError: the settings don't fit the environment, the model, or the run they are to go on with.
    """

    def __init__(
        self,
        config: TrainConfig,
        display: Display,
        dry: bool = False,
        stop: StopRequest | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.config = config
        self.ranks = ranks or Ranks()
        self.display = display
        self.stop = stop or StopRequest()
        self.run_dir = Path(config.run_dir)
        self.start = 0  # the step before the first: a branch's is its checkpoint's
        self.step = 0  # the last one done
        self._resources = ExitStack()
        with ExitStack() as stack:  # closes what was opened where something fails on the way
            self._build(stack, dry)
            self._resources = stack.pop_all()

    def run(self) -> list[Record]:
        """Train to the last step; returns the evaluation's records.

        Raises:
            Stopped: asked for by a signal. This, and what follows, leaves a checkpoint of the last step done.
            EnvironmentFailure: too many episodes in a row were lost.
            CollapsedError: a collapse warning, under watch.stop.
            RunError: too many updates in a row without a finite gradient (the batch is in run_dir/nonfinite), or a
                checkpoint could not be written. The last checkpoint is whole.
        """
        try:
            with precision(self.policy.model, self.config.model.dtype):
                self._run()
        except (Stopped, EnvironmentFailure, CollapsedError):
            # Raised where no step is half done: the state in memory is that of the last one.
            self._save()
            write_report(self.run_dir)
            raise
        except NonFiniteError as error:
            folder = save_batch(self.run_dir / "nonfinite" / f"step_{self.step + 1:05d}", error)
            write_report(self.run_dir)
            raise RunError(
                f"step {self.step + 1}: {error}. The last one's batch is in {folder}; the last checkpoint is whole"
            ) from error
        write_report(self.run_dir)
        return self.tracker.records

    def _run(self) -> None:
        config = self.config
        if self.step == self.start:
            self._evaluate("before", self.start)
        self._evaluate_if_due(self.step)
        for step in range(self.step + 1, config.steps + 1):
            self.ranks.check(self.stop)
            metrics = self._train_step(step)
            self.step = step
            self.tracker.log(step, metrics)
            self.display.say(_line(step, config.steps, metrics))
            self._watch(step, metrics)
            self._evaluate_if_due(step)
            if step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                self._save()
                write_report(self.run_dir)
        if config.steps > self.start:
            self._evaluate("after", config.steps)

    def _evaluate_if_due(self, step: int) -> None:
        every = self.config.evaluate.every
        if every and step % every == 0 and self.start < step < self.config.steps:
            self._evaluate(f"step {step}", step)

    def _watch(self, step: int, metrics: Mapping[str, Value]) -> None:
        for alarm in (alarms := self.watch.observe(step, metrics)):
            self.display.say(f"warning: step {step}: {alarm.text}")
        if alarms and self.config.watch.stop:
            raise CollapsedError(f"stopped at step {step}, as watch.stop asks: {alarms[0].text}")

    def _bar(self, name: str, total: int, unit: str = "episodes") -> AbstractContextManager[Report]:
        """A bar whose every move is a moment at which the run can be stopped."""
        return self.display.bar(name, total, unit, self.stop.check)

    def _samples_bar(self, name: str, total: int) -> AbstractContextManager[Report]:
        """A bar of work that is never stopped half done."""
        return self.display.bar(name, total, "samples")

    def _train_step(self, step: int) -> dict[str, Value]:
        """Rollout, old log-probs and entropies, weights against the rollout's, history, advantages, update."""
        config, history = self.config, self.history
        seconds: dict[str, float] = {}
        with _timed(seconds, "step"):
            with _timed(seconds, "gen"):
                collected = self.collector.collect(step, lambda total: self._bar(f"step {step}, rollout", total))
            seconds |= {f"gen_{name}": spent for name, spent in collected.seconds.items()}
            self._prefetch(step + 1)

            samples = samples_of(collected.kept, config.rollout.layout)
            with (
                _timed(seconds, "old_log_prob"),
                self._samples_bar(f"step {step}, old log-probs", len(samples)) as report,
            ):
                self.learner.score(samples, report)
            correction = rollout_is_level(config), config.loss.rollout_is_cap
            set_rollout_weights(samples, *correction)
            if self.critic:
                with _timed(seconds, "values"), self._samples_bar(f"step {step}, values", len(samples)) as report:
                    self.critic.score(samples, report)

            turns, entropy = sampled_entropy(samples)
            own = slice(self.ranks.rank, None, self.ranks.size)  # committing adds up what all ranks hold
            history.update(turns[own], entropy[own], torch.ones_like(turns[own]))
            if config.loss.history_includes_current:
                self._commit_history(step)

            learned = assign_advantages(collected.kept, samples, config.algorithm, config.loss.kl_type)
            # Of everything sampled, so before truncated responses are masked.
            sampled = {
                **token_metrics(samples, config.rollout.max_response_tokens),
                **mismatch_metrics(samples, *correction),
            }
            num_tokens = sum(sample.length for sample in samples)
            if config.algorithm.mask_truncated:
                samples = leave_out_truncated(samples, config.rollout.max_response_tokens)

            seed = (config.seed, Draw.MINIBATCHES, step)
            if self.critic:
                total = config.critic.epochs * len(samples)
                with (
                    _timed(seconds, "update_critic"),
                    self._samples_bar(f"step {step}, critic's update", total) as report,
                ):
                    learned |= self.critic.update(samples, seed, report)
            horizon = config.loss.phase_horizon or config.horizon
            phase_weight = ek.phase_weight(step - 1, horizon, config.loss.phase_schedule)
            total = config.optim.epochs * len(samples)
            with _timed(seconds, "update_actor"), self._samples_bar(f"step {step}, update", total) as report:
                if not self.critic or step > config.critic.warmup_steps:
                    learned |= self.learner.update(samples, history, phase_weight, seed, report)
            if not config.loss.history_includes_current:
                self._commit_history(step)
        self.tracker.save_episodes(f"train_step_{step:05d}", collected.episodes[: config.algorithm.group_size])
        return {
            **learned,
            **entropy_metrics(turns, entropy, history),
            "epo/phase_weight": phase_weight,
            **episode_metrics(collected.episodes, collected.played),
            **collected.metrics(),
            **sampled,
            "perf/throughput": num_tokens / seconds["step"],
            **{f"timing_s/{name}": spent for name, spent in seconds.items()},
        }

    def _commit_history(self, step: int) -> None:
        try:
            self.history.commit(self.ranks.group)
        except ValueError as error:
            raise RunError(f"step {step}: {error}; the last checkpoint is whole") from error

    def _prefetch(self, step: int) -> None:
        """Environments reset while the model updates, unless an evaluation needs them first."""
        every = self.config.evaluate.every
        if step <= self.config.steps and not (every and (step - 1) % every == 0):
            self.rollout.prefetch(self.collector.draw(step))

    def _evaluate(self, when: str, step: int) -> None:
        """Play what isn't on record yet of this moment."""
        config = self.config.evaluate
        present = {(record.when, record.panel, record.decoding) for record in self.tracker.records}
        for panel, tasks in self.panels.items():
            missing = [decoding for decoding in config.decoding if (when, panel, decoding) not in present]
            if not missing:
                continue
            episodes = panel_starts(tasks, panel, missing, self.config.seed)
            with self._bar(f"evaluation {when}, {panel}", len(episodes)) as bar:
                self.rollout.play(episodes, bar)
            records = []
            for index, decoding in enumerate(missing):
                own = episodes[index * len(tasks) : (index + 1) * len(tasks)]
                records.append(summarize(own, when, step, panel, decoding))
                self.tracker.save_episodes(records[-1].name, own)
                self.display.say(records[-1].sentence())
                self._warn_of_actions(records[-1])
            self.tracker.log_evaluation(records)
            write_report(self.run_dir)

    def _warn_of_actions(self, record: Record) -> None:
        lowest = self.config.watch.valid_actions
        if record.valid_action_ratio is not None and record.valid_action_ratio < lowest:
            self.display.say(
                f"warning: the environment understood {record.valid_action_ratio:.1%} of the actions, less than "
                f"watch.valid_actions={lowest:g}; read the responses in {self.config.run_dir}/episodes"
            )

    def _save(self) -> None:
        state = {
            "step": self.step,
            "config": to_yaml(self.config),
            "learner": self.learner.state_dict(),
            "critic": self.critic.state_dict() if self.critic else None,
            "history": self.history.state_dict(),
            "rng": rng_state(),
        }
        weights = self._gathered_weights()
        if self.ranks.is_first:
            folder = self.run_dir / "checkpoints"
            with self.display.bar(f"saving step {self.step}", None):
                save_checkpoint(folder, self.step, self.policy, state, self.config.checkpoint.keep, weights)

    def _save_policy(self, folder: Path) -> None:
        weights = self._gathered_weights()
        if self.ranks.is_first:
            self.policy.save(folder, weights)

    def _gathered_weights(self) -> dict[str, torch.Tensor] | None:
        """What to save of a policy that is split over ranks, complete on the first; None: as it is."""
        if not self.ranks.fsdp:
            return None
        state = self.policy.model.state_dict()
        if self.config.model.lora_rank:
            state = {name: value for name, value in state.items() if "lora_" in name}
        return self.ranks.gather_state(state)

    def _build(self, stack: ExitStack, dry: bool) -> None:
        config = self.config
        require_peft(config.model)
        require_wandb(config.tracking)
        require_vllm(config.rollout)
        if config.model.threads:
            torch.set_num_threads(config.model.threads)
        self.ranks.on_first(
            lambda: check_usable(self.run_dir) if dry else stack.enter_context(held(self.run_dir, self.display.say))
        )
        checkpoint = find_checkpoint(config)
        state = load_state(checkpoint) if checkpoint else None
        is_branch = checkpoint is not None and is_foreign(checkpoint, self.run_dir)
        if state is not None:
            self.start = state["step"] if is_branch else start_of(self.run_dir)
        if not self.ranks.is_first:  # writes where nobody looks
            self.run_dir = copy_records(self.run_dir, Path(stack.enter_context(TemporaryDirectory())))
        self.ranks.wait()  # from here on the first one changes the run's folder
        if state is not None:
            self.config = config = keep_horizon(state["config"], config)
            for text in review_differences(state["config"], config, state["step"], is_branch):
                self.display.say(text)
        self.display.say(opening(config, self.ranks))
        environment = config.env
        if dry:  # what the cache lacks is made for this once
            folder = stack.enter_context(TemporaryDirectory())
            environment = replace(environment, cache_dir=borrow_cache(environment.cache_dir, folder))
        try:
            self.suite = make_suite(environment)
        except (ImportError, ValueError) as error:
            raise ConfigError(str(error)) from error
        stack.callback(self.suite.close)
        self.tasks = self.suite.tasks("train")
        self.panels = {panel: self.suite.tasks(panel)[: config.evaluate.episodes] for panel in config.evaluate.panels}
        self.suite.close()  # the simulator that listed them
        self.display.say(about_tasks(self.suite, self.tasks, self.panels, config))

        if checkpoint:
            self.policy = self._load(checkpoint / "actor")
        else:
            self.policy = self._shared_policy(dry)
        self.display.say(about_policy(self.policy))
        with self.display.bar("starting the engine", None):
            self.engine = self._make_engine(stack)
        sampled = None if isinstance(self.engine, StreamingEngine) else self.policy.model
        self.rollout = SharedRollout(self._player(stack), self.ranks, sampled)
        self.collector = Collector(self.tasks, self.rollout, config)
        loss = config.loss
        self.history = ek.EntropyHistory(
            self.suite.max_turns,
            loss.history_window,
            cast(HistoryScope, loss.history_scope),
            cast(HistoryWeighting, loss.history_weighting),
        )
        if not dry and (checkpoint is None or is_branch):
            clear_run(self.run_dir)
        if not dry and checkpoint and is_branch:
            note_branch(self.run_dir, checkpoint)
        if not dry and state is not None:
            drop_later_checkpoints(self.run_dir / "checkpoints", state["step"])
        reference = self._reference(checkpoint, dry)
        self.critic = Critic(self.policy, config, self.ranks) if config.algorithm.name == "ppo" else None
        self.learner = Learner(self.policy, reference, config, self.ranks)
        if state is not None:
            self._restore(state, is_branch)
        if self.ranks.is_first and (warning := self._room_warning()):
            self.display.say(f"warning: {warning}")
        if not dry:
            self._save()  # the start is frozen: a run killed from here on goes on from the same weights
            self.tracker = self._tracker()
            stack.push(self._close_tracker)
            self.watch, _ = watched(read_metrics(self.run_dir), config.watch)
            write_atomically(self.run_dir / "config.yaml", to_yaml(config))

    def _room_warning(self) -> str | None:
        config = self.config
        parameters = list(self.policy.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        other = 0 if config.model.lora_rank else sum(p.numel() for p in parameters) - trained
        if self.critic:
            trained *= 2  # its backbone is the policy's
        return room_warning(self.run_dir / "checkpoints", trained, other, config.checkpoint.keep)

    def _make_engine(self, stack: ExitStack) -> Engine | StreamingEngine:
        """What writes the policy's responses."""
        policy, rollout = self.policy, self.config.rollout
        stop = StopRule(policy.tokenizer, policy.end_ids, rollout.response_format, policy.chat.opening)
        if rollout.engine == "transformers":
            return TransformersEngine(
                policy.model, policy.pad_id, stop, rollout.temperature, rollout.max_response_tokens
            )
        engine = VllmEngine(policy, stop, self.config)
        stack.callback(engine.close)
        return engine

    def _player(self, stack: ExitStack) -> Rollout:
        """This process's environments, and what plays in them."""
        env, rollout = self.config.env, self.config.rollout
        self.pool = EnvironmentPool(
            self.suite,
            rollout.environments,
            step_timeout=env.step_timeout,
            start_timeout=env.start_timeout,
            max_failures=env.max_failures,
        )
        stack.callback(self.pool.close)
        return Rollout(
            self.pool,
            self.policy,
            self.engine,
            self._prompts(self.policy),
            max_turns=self.suite.max_turns,
            cohorts=rollout.cohorts,
            response_format=rollout.response_format,
        )

    def _tracker(self) -> Tracker:
        shown_elsewhere = self.config.tracking.wandb != "disabled" and self.ranks.is_first
        boards = [WeightsAndBiases(self.run_dir, self.config, self.display.say)] if shown_elsewhere else []
        tracker = Tracker(self.run_dir, self.step, *boards)
        tracker.extend(self.config.steps)
        if tracker.lost:
            self.display.say(
                f"warning: metrics.jsonl was damaged and is repaired; no line is left for steps {tracker.lost}"
            )
        return tracker

    def _close_tracker(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.tracker.close(failed=error is not None and not isinstance(error, Stopped))

    def _restore(self, state: dict[str, Any], is_branch: bool) -> None:
        self.step = state["step"]
        self.learner.load_state_dict(state["learner"])
        if self.critic and state["critic"] is not None:
            self.critic.load_state_dict(state["critic"])
        elif self.critic:
            self.display.say("the run that this one branches from had no critic: a new one is trained")
        try:
            self.history.load_state_dict(state["history"])
        except ValueError as error:
            if not is_branch:
                raise ConfigError(f"{error}; the environment is not the one that the run began with") from error
            self.display.say(f"the entropy history starts empty: {error}")
        set_rng_state(state["rng"])

    def _load(self, source: str | Path, frozen: bool = False) -> Policy:
        """A saved policy, split over the ranks where the run's are, before a weight is read.

        Args:
            source: a folder or hub id.
            frozen: it isn't trained, so the weights of products may have their dtype (`hold_products_in`).
        """
        dtype = getattr(torch, self.config.model.dtype)
        narrow = frozen and dtype != torch.float32

        def prepare(model: PreTrainedModel, device: torch.device) -> None:
            if frozen:
                model.requires_grad_(False)
            if narrow:
                hold_products_in(model, dtype)
            self.ranks.shard(model.get_decoder(), device)

        with self.display.bar(f"loading {source}", None):
            split = prepare if self.ranks.fsdp or narrow else None
            policy = load_policy(str(source), self.config.model, split, self.display.say)
        return policy if frozen else self._checked(policy, str(source))

    def _shared_policy(self, dry: bool) -> Policy:
        """The policy before RL, read by every rank; made by the first one where it isn't there to be loaded."""
        model, ranks = self.config.model, self.ranks
        if ranks.fsdp and model.name_or_path not in FROM_SCRATCH and not model.warm_start.demonstrations:
            policy = self._load(model.name_or_path)
            if model.lora_rank:
                torch.manual_seed(self.config.seed)  # every rank draws the same
                add_adapters(policy.model, model)
            return policy
        if dry:
            return self._first_policy(dry)
        start = Path(self.config.run_dir) / "start"
        if ranks.is_first:
            policy = self._first_policy(dry)
            if ranks.size == 1:
                return policy
            policy.save(start)
            del policy  # whole, which what is read needn't be
        ranks.wait()
        policy = self._load(start)
        ranks.wait()
        if ranks.is_first:
            shutil.rmtree(start, ignore_errors=True)
        return policy

    def _first_policy(self, dry: bool) -> Policy:
        """The policy before RL: loaded or made, and cloned from demonstrations where asked for."""
        model, warm_start, seed = self.config.model, self.config.model.warm_start, self.config.seed
        from_scratch = model.name_or_path in FROM_SCRATCH
        if not from_scratch:  # before the demonstrations, which take minutes: the model may be unusable
            with self.display.bar(f"loading {model.name_or_path}", None):
                policy = load_policy(model.name_or_path, model, say=self.display.say)
            self._checked(policy, model.name_or_path)
        count = min(warm_start.demonstrations, 1) if dry else warm_start.demonstrations
        if count:
            self.display.say(f"demonstrations: {count} episodes of {self.suite.name}")
        with self._bar("demonstrations", count) as bar:
            demonstrations = demonstrate(self.suite, count, bar) if count else []
        if from_scratch:
            policy = self._checked(build_from_scratch(demonstrations, model, seed), model.name_or_path)
        if demonstrations and not dry:
            samples = cloning_samples(
                demonstrations,
                policy,
                self._prompts(policy),
                self.config.rollout.max_response_tokens,
                self.config.rollout.layout,
            )
            self.display.say(f"cloning: {len(samples)} turns for {warm_start.epochs} epochs; {about_policy(policy)}")
            with self._bar("cloning", warm_start.epochs, "epochs") as bar, precision(policy.model, model.dtype):
                losses = clone(policy, samples, warm_start, seed, bar)
            self.display.say(
                f"cloned {len(samples)} turns for {warm_start.epochs} epochs: loss {losses[0]:.3f} to {losses[-1]:.3f}"
            )
        if model.lora_rank:
            if (
                from_scratch or demonstrations
            ) and not dry:  # checkpoints hold adapters alone: keep what they belong to
                base = (self.run_dir / "base").resolve()
                policy.save(base)
                policy = load_policy(str(base), model)
            if not from_scratch:  # building from scratch has seeded already
                torch.manual_seed(seed)
            add_adapters(policy.model, model)
        return policy

    def _checked(self, policy: Policy, source: str) -> Policy:
        """The policy, if it can do what the settings ask of it."""
        try:
            for warning in check_policy(policy, self.config):
                self.display.say(f"warning: {source}: {warning}")
        except ConfigError as error:
            raise ConfigError(f"model.name_or_path={source}: {error}") from error
        return policy

    def _prompts(self, policy: Policy) -> Prompts:
        rollout = self.config.rollout
        window = PromptBuilder(
            policy.chat,
            rollout.history,
            rollout.history_results,
            rollout.max_prompt_tokens,
            rollout.response_format,
            rollout.goal_last,
            rollout.instruction,
            rollout.admissible_actions,
        )
        if rollout.layout == "turn":
            return window
        return DialogueBuilder(window, policy.chat, rollout.max_prompt_tokens)

    def _reference(self, checkpoint: Path | None, dry: bool) -> PreTrainedModel | None:
        """The frozen starting policy, for the KL term; kept in the run's folder."""
        if dry or not (self.config.loss.kl_coeff or self.config.algorithm.kl_reward_coeff):
            return None
        if self.config.model.lora_rank:
            return self.policy.model  # without its adapters
        folder = Path(self.config.run_dir) / "reference"
        if checkpoint is None:
            self._save_policy(folder)
        elif self.ranks.is_first and is_foreign(checkpoint, self.run_dir):
            load_policy(str(self._first_reference(checkpoint)), self.config.model).save(folder)
        self.ranks.wait()
        return self._load(folder, frozen=True).model.requires_grad_(False)

    def _first_reference(self, checkpoint: Path) -> Path:
        """A branch's reference: its origin's where that has one."""
        reference = checkpoint.parent.parent / "reference"
        if reference.is_dir():
            return reference
        self.display.say(f"the KL is to the policy of {checkpoint}, since its run kept no policy from before RL")
        return checkpoint / "actor"

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *error: Any) -> None:
        self._resources.__exit__(*error)


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start


def _line(step: int, steps: int, metrics: dict[str, Value]) -> str:
    return (
        f"step {step}/{steps}: return {metrics['episode/reward/mean']:.3f}, "
        f"success {metrics['episode/success_rate']:.0%}, score {metrics['episode/score/mean']:.1f}, "
        f"turns {metrics['episode/length/mean']:.1f}, understood {metrics['episode/valid_action_ratio']:.0%}, "
        f"entropy {metrics['actor/entropy']:.3f}, "
        f"{metrics['timing_s/step']:.1f} s"
    )
