"""The training loop, to be read from top to bottom."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

import epo_kernels as ek
from epo_kernels.history import HistoryScope, HistoryWeighting
from epo_kernels.train.advantages import grpo_advantages
from epo_kernels.train.checkpoint import (
    clear_run,
    drop_later_checkpoints,
    find_checkpoint,
    load_state,
    refuse_differences,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from epo_kernels.train.config import ConfigError, TrainConfig, to_yaml
from epo_kernels.train.data import Draw, Episode, Sample
from epo_kernels.train.envs import make_suite
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.evaluate import Record, panel_starts, summarize
from epo_kernels.train.learner import Learner
from epo_kernels.train.policies.generate import StopRule, TransformersEngine
from epo_kernels.train.policies.policy import Policy, build_tiny, load_policy
from epo_kernels.train.policies.prompts import PromptBuilder
from epo_kernels.train.policies.warm_start import clone, cloning_samples, demonstrate
from epo_kernels.train.report import write_report
from epo_kernels.train.rollout import Rollout
from epo_kernels.train.step_metrics import entropy_metrics, episode_metrics, token_metrics
from epo_kernels.train.tracking import Display, Tracker, Value, write_atomically


class Trainer:
    """Everything a run needs, built and connected. Close it (or use `with`): environments may be processes.

    Args:
        config: checked.
        display: where progress shows.
        dry: build all parts without training any (no cloning) and write nothing.

    Raises:
        ConfigError: the settings don't fit the environment, the model, or the run they are to go on with.
    """

    def __init__(self, config: TrainConfig, display: Display, dry: bool = False) -> None:
        self.config = config
        self.display = display
        self.run_dir = Path(config.run_dir)
        self.step = 0  # the last one done
        self._resources = ExitStack()
        with ExitStack() as stack:  # closes what was opened where something fails on the way
            self._build(stack, dry)
            self._resources = stack.pop_all()

    def run(self) -> list[Record]:
        """Train to the last step; returns the evaluation's records."""
        config = self.config
        if self.step == 0:
            self._evaluate("before", 0)
        for step in range(self.step + 1, config.steps + 1):
            metrics = self._train_step(step)
            self.step = step
            if config.evaluate.every and step % config.evaluate.every == 0 and step < config.steps:
                metrics["timing_s/testing"] = self._evaluate(f"step {step}", step)
            self.tracker.log(step, metrics)
            self.display.say(_line(step, config.steps, metrics))
            if step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                self._save()
                write_report(self.run_dir)
        if config.steps:
            self._evaluate("after", config.steps)
        write_report(self.run_dir)
        return self.tracker.records

    def _train_step(self, step: int) -> dict[str, Value]:
        """Rollout, old log-probs and entropies, history, advantages, update."""
        config, history = self.config, self.history
        seconds: dict[str, float] = {}
        with _timed(seconds, "step"):
            with _timed(seconds, "gen"), self.display.bar(f"step {step}", config.algorithm.groups * self._size) as bar:
                episodes = self._episodes(step)
                self.rollout.play(episodes, bar)
            seconds |= {f"gen_{name}": spent for name, spent in self.rollout.seconds.items()}
            self._prefetch(step + 1)
            played = [episode for episode in episodes if not episode.failed]
            if not played:
                raise RuntimeError(f"step {step}: no episode could be played; the first: {episodes[0].finish}")

            samples = [
                Sample(turn.prompt_ids, turn.response_ids, number)
                for episode in played
                for number, turn in enumerate(episode.turns)
            ]
            with _timed(seconds, "old_log_prob"):
                entropies = self.learner.score(samples)

            turns = torch.cat([torch.full((len(s.response_ids),), s.turn) for s in samples])
            entropy = torch.cat(entropies)
            history.update(turns, entropy, torch.ones_like(turns))
            if config.loss.history_includes_current:
                self._commit_history(step)

            advantages = grpo_advantages(
                torch.tensor([episode.total_reward for episode in played]),
                torch.tensor([episode.group for episode in played]),
                config.algorithm.normalize_std,
            )
            spread = [a for a, e in zip(advantages.values.tolist(), played, strict=True) for _ in e.turns]
            for sample, advantage in zip(samples, spread, strict=True):
                sample.advantage = advantage

            phase_weight = ek.phase_weight(step - 1, config.steps, config.loss.phase_schedule)
            with _timed(seconds, "update_actor"):
                updated = self.learner.update(
                    samples, history, phase_weight, seed=(config.seed, Draw.MINIBATCHES, step)
                )
            if not config.loss.history_includes_current:
                self._commit_history(step)
        self.tracker.save_episodes(f"train_step_{step:05d}", episodes[: self._size])
        return {
            **updated,
            **entropy_metrics(turns, entropy, history),
            "epo/phase_weight": phase_weight,
            **episode_metrics(episodes, played, advantages),
            **token_metrics(played, samples, config.rollout.max_response_tokens),
            "perf/throughput": sum(s.length for s in samples) / seconds["step"],
            **{f"timing_s/{name}": spent for name, spent in seconds.items()},
        }

    def _commit_history(self, step: int) -> None:
        try:
            self.history.commit()
        except ValueError as error:
            raise RuntimeError(f"step {step}: {error}; the last checkpoint is whole") from error

    def _episodes(self, step: int) -> list[Episode]:
        """A step's episodes, not yet played: tasks by lot, `group_size` episodes of each."""
        config = self.config
        generator = np.random.default_rng([config.seed, Draw.TASKS, step])
        groups = config.algorithm.groups
        chosen = generator.choice(len(self.tasks), groups, replace=groups > len(self.tasks))
        return [
            Episode(self.tasks[task], group, (config.seed, Draw.EPISODE, step, group * self._size + member))
            for group, task in enumerate(chosen)
            for member in range(self._size)
        ]

    @property
    def _size(self) -> int:
        return self.config.algorithm.group_size

    def _prefetch(self, step: int) -> None:
        """Environments reset while the model updates, unless an evaluation needs them first."""
        every = self.config.evaluate.every
        if step <= self.config.steps and not (every and (step - 1) % every == 0):
            self.rollout.prefetch(self._episodes(step))

    def _evaluate(self, when: str, step: int) -> float:
        """Play what isn't on record yet of this moment; returns the seconds it took."""
        start = time.perf_counter()
        config = self.config.evaluate
        present = {(record.when, record.panel, record.decoding) for record in self.tracker.records}
        for panel, tasks in self.panels.items():
            missing = [decoding for decoding in config.decoding if (when, panel, decoding) not in present]
            if not missing:
                continue
            episodes = panel_starts(tasks, panel, missing, self.config.seed)
            with self.display.bar(f"evaluation {when}", len(episodes)) as bar:
                self.rollout.play(episodes, bar)
            records = []
            for index, decoding in enumerate(missing):
                own = episodes[index * len(tasks) : (index + 1) * len(tasks)]
                records.append(summarize(own, when, step, panel, decoding))
                self.tracker.save_episodes(f"{when.replace(' ', '_')}_{panel}_{decoding}", own)
                self.display.say(records[-1].sentence())
            self.tracker.log_evaluation(records)
        return time.perf_counter() - start

    def _save(self) -> None:
        state = {
            "step": self.step,
            "config": to_yaml(self.config),
            "learner": self.learner.state_dict(),
            "history": self.history.state_dict(),
            "rng": rng_state(),
        }
        save_checkpoint(self.run_dir / "checkpoints", self.step, self.policy, state, self.config.checkpoint.keep)

    def _build(self, stack: ExitStack, dry: bool) -> None:
        config = self.config
        if config.model.threads:
            torch.set_num_threads(config.model.threads)
        checkpoint = find_checkpoint(config)
        state = load_state(checkpoint) if checkpoint else None
        if state is not None:
            refuse_differences(state["config"], config)
        try:
            self.suite = make_suite(config.env)
        except (ImportError, ValueError) as error:
            raise ConfigError(str(error)) from error
        stack.callback(self.suite.close)
        self.tasks = self.suite.tasks("train")
        self.panels = {panel: self.suite.tasks(panel)[: config.evaluate.episodes] for panel in config.evaluate.panels}
        self.suite.close()  # the simulator that listed them

        self.policy = load_policy(str(checkpoint / "actor"), config.model) if checkpoint else self._first_policy(dry)
        rollout = config.rollout
        self.pool = EnvironmentPool(
            self.suite,
            rollout.environments,
            step_timeout=config.env.step_timeout,
            start_timeout=config.env.start_timeout,
        )
        stack.callback(self.pool.close)
        stop = StopRule(self.policy.tokenizer, self.policy.end_ids, rollout.response_format)
        self.rollout = Rollout(
            self.pool,
            self.policy,
            TransformersEngine(
                self.policy.model, self.policy.pad_id, stop, rollout.temperature, rollout.max_response_tokens
            ),
            self._prompts(self.policy),
            max_turns=self.suite.max_turns,
            cohorts=rollout.cohorts,
            response_format=rollout.response_format,
        )
        loss = config.loss
        self.history = ek.EntropyHistory(
            self.suite.max_turns,
            loss.history_window,
            cast(HistoryScope, loss.history_scope),
            cast(HistoryWeighting, loss.history_weighting),
        )
        if not dry and checkpoint is None:
            clear_run(self.run_dir)
        if not dry and state is not None:
            drop_later_checkpoints(self.run_dir / "checkpoints", state["step"])
        self.learner = Learner(self.policy, self._reference(checkpoint, dry), config)
        if state is not None:
            self.step = state["step"]
            self.learner.load_state_dict(state["learner"])
            self.history.load_state_dict(state["history"])
            set_rng_state(state["rng"])
        if not dry:
            self.tracker = Tracker(self.run_dir, self.step)
            stack.callback(self.tracker.close)
            write_atomically(self.run_dir / "config.yaml", to_yaml(config))
            if checkpoint is None:
                self._save()  # the start is frozen: a run killed from here on goes on from the same weights

    def _first_policy(self, dry: bool) -> Policy:
        """The policy before RL: loaded or made, and cloned from demonstrations where asked for."""
        model, warm_start, seed = self.config.model, self.config.model.warm_start, self.config.seed
        count = min(warm_start.demonstrations, 1) if dry else warm_start.demonstrations
        if count:
            self.display.say(f"demonstrations: {count} gold episodes of {self.suite.name}")
        demonstrations = demonstrate(self.suite, count) if count else []
        is_tiny = model.name_or_path == "tiny"
        policy = build_tiny(demonstrations, model, seed) if is_tiny else load_policy(model.name_or_path, model)
        if demonstrations and not dry:
            samples = cloning_samples(
                demonstrations, policy, self._prompts(policy), self.config.rollout.max_response_tokens
            )
            with self.display.bar("cloning", warm_start.epochs) as bar:
                losses = clone(policy, samples, warm_start, seed, bar)
            self.display.say(
                f"cloned {len(samples)} turns for {warm_start.epochs} epochs: loss {losses[0]:.3f} to {losses[-1]:.3f}"
            )
        return policy

    def _prompts(self, policy: Policy) -> PromptBuilder:
        rollout = self.config.rollout
        return PromptBuilder(
            policy.tokenizer,
            rollout.history,
            rollout.history_results,
            rollout.max_prompt_tokens,
            rollout.response_format,
        )

    def _reference(self, checkpoint: Path | None, dry: bool) -> PreTrainedModel | None:
        """The frozen starting policy, for the KL term; kept in the run's folder."""
        if not self.config.loss.kl_coeff or dry:
            return None
        folder = self.run_dir / "reference"
        if checkpoint is None:
            self.policy.save(folder)
        elif not folder.is_dir():  # resumed from another run's checkpoint
            load_policy(str(checkpoint.parent.parent / "reference"), self.config.model).save(folder)
        return load_policy(str(folder), self.config.model).model.requires_grad_(False)

    def close(self) -> None:
        self._resources.close()

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _line(step: int, steps: int, metrics: dict[str, Value]) -> str:
    return (
        f"step {step}/{steps}: return {metrics['episode/reward/mean']:.3f}, "
        f"success {metrics['episode/success_rate']:.0%}, score {metrics['episode/score/mean']:.1f}, "
        f"turns {metrics['episode/length/mean']:.1f}, entropy {metrics['actor/entropy']:.3f}, "
        f"{metrics['timing_s/step']:.1f} s"
    )
