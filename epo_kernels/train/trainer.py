"""The training loop, written to be read from top to bottom. `build` constructs its parts."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch

import epo_kernels as ek
from epo_kernels.train.data import Draw, Sample, samples_of
from epo_kernels.train.envs import EnvironmentFailure, Task
from epo_kernels.train.evaluate import Record, panel_starts, summarize
from epo_kernels.train.io.failures import PromptTooLong, RunError
from epo_kernels.train.io.phases import Phases
from epo_kernels.train.io.progress import Report
from epo_kernels.train.io.report import write_report
from epo_kernels.train.io.stopping import Stopped, StopRequest
from epo_kernels.train.io.tracking import Value
from epo_kernels.train.io.watch import CollapsedError
from epo_kernels.train.models.policy import precision
from epo_kernels.train.parts import Parts
from epo_kernels.train.rl.algorithms import assign_advantages, leave_out_truncated
from epo_kernels.train.rl.metrics import entropy_metrics, episode_metrics, sampled_entropy, step_line, token_metrics
from epo_kernels.train.rl.mismatch import mismatch_metrics, rollout_is_level, set_rollout_weights
from epo_kernels.train.rl.post_mortem import NonFiniteError, save_batch


class Trainer:
    """Runs the training loop.

    Args:
        stop: checked at every progress update of a rollout, and before each step.
    """

    def __init__(self, parts: Parts, stop: StopRequest | None = None) -> None:
        self.parts = parts
        self.config = parts.config
        self._stop = stop or StopRequest()

    def run(self) -> list[Record]:
        """Train to the last step; returns the evaluation records.

        Raises:
            Stopped: a signal requested it. This and all errors below leave a checkpoint of the last completed step.
            EnvironmentFailure: too many consecutive episodes were lost.
            PromptTooLong: a task's goal does not fit rollout.max_prompt_tokens.
            CollapsedError: a collapse warning, with watch.stop.
            RunError: too many consecutive updates without a finite gradient (the batch is in run_dir/nonfinite), or a
                checkpoint could not be written. The last checkpoint is intact.
        """
        parts = self.parts
        try:
            with precision(parts.policy.model, self.config.model.dtype):
                self._loop()
        except (Stopped, EnvironmentFailure, PromptTooLong, CollapsedError):
            # Raised between steps or while playing, so the state in memory is that of the last completed step.
            parts.save()
            write_report(parts.run_dir)
            raise
        except NonFiniteError as error:
            step = parts.step + 1
            folder = save_batch(parts.run_dir / "nonfinite" / f"step_{step:05d}", error)
            write_report(parts.run_dir)
            raise RunError(
                f"step {step}: {error}. The last one's batch is in {folder}; the last checkpoint is intact"
            ) from error
        write_report(parts.run_dir)
        return parts.tracker.records

    def _loop(self) -> None:
        parts, config = self.parts, self.config
        if parts.step == parts.start:
            self._evaluate("before", parts.start)
        self._evaluate_if_due(parts.step)
        for step in range(parts.step + 1, config.steps + 1):
            parts.ranks.check(self._stop)
            metrics = self._train_step(step)
            parts.step = step
            parts.tracker.log(step, metrics)
            parts.display.say(step_line(step, config.steps, metrics))
            self._watch(step, metrics)
            self._evaluate_if_due(step)
            if step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
                parts.save()
                write_report(parts.run_dir)
        if config.steps > parts.start:
            self._evaluate("after", config.steps)

    def _train_step(self, step: int) -> dict[str, Value]:
        """One step of EPO; returns its metrics."""
        parts, config = self.parts, self.config
        history, learner, critic = parts.history, parts.learner, parts.critic
        seed = (config.seed, Draw.MINIBATCHES, step)
        phase = Phases(parts.display, step)
        with phase.timed("step"):
            # Rollout: groups of episodes, played by the current policy; turns of the kept episodes become samples.
            with phase.timed("gen"):
                collected = parts.collector.collect(step, lambda total: self._bar(f"step {step}, rollout", total))
            phase.seconds |= {f"gen_{name}": spent for name, spent in collected.seconds.items()}
            self._prefetch(step + 1)
            samples = samples_of(collected.kept, config.rollout.layout)

            # Log-probs and entropies under the policy before the update; importance weights if the engine's differ.
            with phase("old_log_prob", len(samples)) as report:
                learner.score(samples, report)
            set_rollout_weights(samples, rollout_is_level(config), config.loss.rollout_is_cap)
            if critic:
                with phase("values", len(samples)) as report:
                    critic.score(samples, report)

            # Entropy history: the loss keeps token entropies within a band around the historical mean.
            turns, entropy = sampled_entropy(samples)
            own = slice(parts.ranks.rank, None, parts.ranks.size)  # committing sums over the ranks
            history.update(turns[own], entropy[own], torch.ones_like(turns[own]))
            if config.loss.history_includes_current:
                self._commit_history(step)

            # Advantages
            learned = assign_advantages(collected.kept, samples, config.algorithm, config.loss.kl_type)
            num_tokens = sum(sample.length for sample in samples)
            measured = self._measured(samples)  # before truncated responses are masked
            if config.algorithm.mask_truncated:
                samples = leave_out_truncated(samples, config.rollout.max_response_tokens)

            # Update: first the critic, then the policy with the EPO loss, whose penalty follows a schedule.
            if critic:
                with phase("update_critic", config.critic.epochs * len(samples)) as report:
                    learned |= critic.update(samples, seed, report)
            horizon = config.loss.phase_horizon or config.horizon
            penalty_weight = ek.phase_weight(step - 1, horizon, config.loss.phase_schedule)
            with phase("update_actor", config.optim.epochs * len(samples)) as report:
                if not critic or critic.steps_done > config.critic.warmup_steps:
                    learned |= learner.update(samples, history, penalty_weight, seed, report)
            if not config.loss.history_includes_current:
                self._commit_history(step)
        parts.tracker.save_episodes(f"train_step_{step:05d}", collected.episodes[: config.algorithm.group_size])
        return {
            **learned,
            **entropy_metrics(turns, entropy, history),
            "epo/phase_weight": penalty_weight,
            **episode_metrics(collected.episodes, collected.played),
            **collected.metrics(),
            **measured,
            **phase.metrics(),
            "perf/throughput": num_tokens / phase.seconds["step"],
        }

    def _measured(self, samples: Sequence[Sample]) -> dict[str, Value]:
        config = self.config
        return {
            **token_metrics(samples, config.rollout.max_response_tokens),
            **mismatch_metrics(samples, rollout_is_level(config), config.loss.rollout_is_cap),
        }

    def _commit_history(self, step: int) -> None:
        try:
            self.parts.history.commit(self.parts.ranks.group)
        except ValueError as error:
            raise RunError(f"step {step}: {error}; the last checkpoint is intact") from error

    def _prefetch(self, step: int) -> None:
        """Reset environments while the model updates, unless an evaluation needs them first."""
        every = self.config.evaluate.every
        if step <= self.config.steps and not (every and (step - 1) % every == 0):
            self.parts.rollout.prefetch(self.parts.collector.draw(step))

    def _evaluate_if_due(self, step: int) -> None:
        every = self.config.evaluate.every
        if every and step % every == 0 and self.parts.start < step < self.config.steps:
            self._evaluate(f"step {step}", step)

    def _evaluate(self, when: str, step: int) -> None:
        """Play the episodes of this evaluation that are not on record yet."""
        present = {(record.when, record.panel, record.decoding) for record in self.parts.tracker.records}
        for panel, tasks in self.parts.panels.items():
            decodings = [name for name in self.config.evaluate.decoding if (when, panel, name) not in present]
            if decodings:
                self._play_panel(when, step, panel, tasks, decodings)

    def _play_panel(self, when: str, step: int, panel: str, tasks: Sequence[Task], decodings: Sequence[str]) -> None:
        parts = self.parts
        episodes = panel_starts(tasks, panel, decodings, self.config.seed)
        with self._bar(f"evaluation {when}, {panel}", len(episodes)) as report:
            parts.rollout.play(episodes, report)
        records = []
        for index, decoding in enumerate(decodings):
            own = episodes[index * len(tasks) : (index + 1) * len(tasks)]
            records.append(summarize(own, when, step, panel, decoding))
            parts.tracker.save_episodes(records[-1].name, own)
            parts.display.say(records[-1].sentence())
            self._warn_of_actions(records[-1])
        parts.tracker.log_evaluation(records)
        write_report(parts.run_dir)

    def _warn_of_actions(self, record: Record) -> None:
        lowest = self.config.watch.valid_actions
        if record.valid_action_ratio is not None and record.valid_action_ratio < lowest:
            self.parts.display.say(
                f"warning: the environment understood {record.valid_action_ratio:.1%} of the actions, less than "
                f"watch.valid_actions={lowest:g}; read the responses in {self.config.run_dir}/episodes"
            )

    def _watch(self, step: int, metrics: Mapping[str, Value]) -> None:
        alarms = self.parts.watch.observe(step, metrics)
        for alarm in alarms:
            self.parts.display.say(f"warning: step {step}: {alarm.text}")
        if alarms and self.config.watch.stop:
            raise CollapsedError(f"stopped at step {step}, as watch.stop asks: {alarms[0].text}")

    def _bar(self, name: str, total: int) -> AbstractContextManager[Report]:
        """A progress bar of episodes, which checks for stop requests whenever it is updated."""
        return self.parts.display.bar(name, total, "episodes", self._stop.check)
