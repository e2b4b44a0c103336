"""The training loop, to be read from top to bottom."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

import epo_kernels as ek
from epo_kernels.history import HistoryScope, HistoryWeighting
from epo_kernels.train.advantages import GroupAdvantages, grpo_advantages
from epo_kernels.train.checkpoint import (
    list_checkpoints,
    load_state,
    rng_state,
    save_checkpoint,
    set_rng_state,
    step_of,
)
from epo_kernels.train.config import ConfigError, TrainConfig, differences, to_yaml
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
                history.commit()

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
                history.commit()
        self.tracker.save_episodes(f"train_step_{step:05d}", episodes[: self._size])
        return {
            **updated,
            **_entropy_metrics(turns, entropy, history),
            "epo/phase_weight": phase_weight,
            **_episode_metrics(episodes, played, advantages),
            **_token_metrics(played, samples, config.rollout.max_response_tokens),
            "perf/throughput": sum(s.length for s in samples) / seconds["step"],
            **{f"timing_s/{name}": spent for name, spent in seconds.items()},
        }

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
        """Play all panels, unless this moment is on record already; returns the seconds it took."""
        start = time.perf_counter()
        config = self.config.evaluate
        if any(record.when == when for record in self.tracker.records):
            return 0.0
        for panel, tasks in self.panels.items():
            episodes = panel_starts(tasks, panel, config.decoding, self.config.seed)
            with self.display.bar(f"evaluation {when}", len(episodes)) as bar:
                self.rollout.play(episodes, bar)
            records = []
            for index, decoding in enumerate(config.decoding):
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


def find_checkpoint(config: TrainConfig) -> Path | None:
    """The checkpoint to go on from, by `resume`.

    Raises:
        ConfigError: nothing at the path given; or resume=never and the folder holds a run.
    """
    run_dir = Path(config.run_dir)
    if config.resume == "never":
        if (run_dir / "config.yaml").exists():
            raise ConfigError(f"resume=never, but {run_dir} holds a run; choose another run_dir, or resume=auto")
        return None
    if config.resume == "auto":
        present = list_checkpoints(run_dir / "checkpoints")
        return present[-1] if present else None
    path = Path(config.resume)
    if not (path / "trainer.pt").is_file():
        raise ConfigError(
            f"resume must be auto, never or the folder of a checkpoint (global_step_N); {path} has no trainer.pt"
        )
    step_of(path)
    return path


def refuse_differences(saved: str, config: TrainConfig) -> None:
    """Raises ConfigError where the run to go on with had other settings."""
    changed = differences(saved, config)
    if changed:
        raise ConfigError(
            "the run to resume had other settings: "
            + ", ".join(f"{name}={old} (now {new})" for name, (old, new) in changed.items())
            + "; restore them, or choose another run_dir"
        )


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def _entropy_metrics(turns: Tensor, entropy: Tensor, history: ek.EntropyHistory) -> dict[str, Value]:
    """Entropy of the tokens just sampled, over all and by turn (null: nobody got that far), and the history's means."""
    sums = torch.zeros(int(turns.max()) + 1, dtype=torch.float64).index_add_(0, turns, entropy.double())
    counts = torch.bincount(turns)
    return {
        "actor/entropy": float(entropy.double().mean()),
        "epo/entropy_by_turn": _list(sums / counts),
        "epo/history_by_turn": _list(history.means()[: len(counts)]),
    }


def _episode_metrics(
    episodes: Sequence[Episode], played: Sequence[Episode], advantages: GroupAdvantages
) -> dict[str, Value]:
    rewards = [episode.total_reward for episode in played]
    lengths = [len(episode.turns) for episode in played]
    turns = [turn for episode in played for turn in episode.turns]
    return {
        "episode/reward/mean": _mean(rewards),
        "episode/reward/max": max(rewards),
        "episode/reward/min": min(rewards),
        "episode/score/mean": _mean([episode.score for episode in played]),
        "episode/success_rate": _mean([episode.success for episode in played]),
        "episode/official_success_rate": _mean([episode.official_success for episode in played]),
        "episode/length/mean": _mean(lengths),
        "episode/valid_action_ratio": _mean([turn.valid for turn in turns]),
        "episode/failed": len(episodes) - len(played),
        "episode/groups_without_variance": advantages.uniform_groups,
        "episode/groups": advantages.groups,
    }


def _token_metrics(played: Sequence[Episode], samples: Sequence[Sample], limit: int) -> dict[str, Value]:
    responses = [len(sample.response_ids) for sample in samples]
    prompts = [len(sample.prompt_ids) for sample in samples]
    sampled = torch.tensor([p for episode in played for turn in episode.turns for p in turn.log_probs])
    scored = torch.cat([sample.old_log_probs for sample in samples if sample.old_log_probs is not None])
    gap = (sampled.exp() - scored.exp()).abs()
    return {
        "response_length/mean": _mean(responses),
        "response_length/max": max(responses),
        "response_length/clip_ratio": _mean([length >= limit for length in responses]),
        "prompt_length/mean": _mean(prompts),
        "prompt_length/max": max(prompts),
        "training/rollout_probs_diff_mean": float(gap.mean()),
        "training/rollout_probs_diff_max": float(gap.max()),
        "perf/total_num_tokens": sum(prompts) + sum(responses),
    }


def _list(values: Tensor) -> list[float | None]:
    return [None if np.isnan(value) else value for value in values.tolist()]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _line(step: int, steps: int, metrics: dict[str, Value]) -> str:
    return (
        f"step {step}/{steps}: return {metrics['episode/reward/mean']:.3f}, "
        f"success {metrics['episode/success_rate']:.0%}, score {metrics['episode/score/mean']:.1f}, "
        f"turns {metrics['episode/length/mean']:.1f}, entropy {metrics['actor/entropy']:.3f}, "
        f"{metrics['timing_s/step']:.1f} s"
    )
