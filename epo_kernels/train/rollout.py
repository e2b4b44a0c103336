"""The rollout: plays episodes, all live environments in a few cohorts that act while the policy writes for others."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from epo_kernels.train.data import Episode, Turn
from epo_kernels.train.envs import EnvironmentFailure, Observation, StepResult
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.policies.generate import Engine, Request
from epo_kernels.train.policies.policy import Policy
from epo_kernels.train.policies.prompts import Prompts, parse_action


@dataclass
class _Seat:
    """An environment's slot and the episode that is being played there."""

    slot: int
    episode: Episode | None = None
    observation: Observation | None = None
    pending: Future[Any] | None = None


class Rollout:
    """Plays episodes with the current weights.

    Cohorts take turns in a fixed order and each waits for its own environments alone, so what is batched together
    follows from the episodes, never from the clock: the same seed gives the same batches.
    """

    def __init__(
        self,
        pool: EnvironmentPool,
        policy: Policy,
        engine: Engine,
        prompts: Prompts,
        *,
        max_turns: int,
        cohorts: int,
        response_format: str,
    ) -> None:
        self._pool = pool
        self._policy = policy
        self._engine = engine
        self._prompts = prompts
        self._max_turns = max_turns
        self._cohorts = cohorts
        self._response_format = response_format
        self.seconds = {"model": 0.0, "environment": 0.0}  # of the last `play`: generating, waiting for environments

    def prefetch(self, episodes: Sequence[Episode]) -> None:
        """Begin to reset environments for the next `play` of these episodes, and return at once."""
        self._pool.prefetch([episode.task for episode in episodes[: self._pool.size]])

    def play(self, episodes: Sequence[Episode], report: Callable[[int], None] = lambda done: None) -> None:
        """Play each episode to its end, filling in its turns and outcome; `report(number of finished ones)`.

        An episode whose environment fails is marked `failed`, with the reason in `finish`.
        """
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        waiting = deque(episodes)
        seats = [_Seat(slot) for slot in range(min(self._pool.size, len(episodes)))]
        for seat in seats:
            self._seat_next(seat, waiting)
        cohorts = [seats[i :: self._cohorts] for i in range(self._cohorts)]
        while any(seat.episode for seat in seats):
            for cohort in cohorts:
                ready = [seat for seat in cohort if seat.episode and self._collect(seat, waiting)]
                if ready:
                    self._act(ready)
            report(len(episodes) - len(waiting) - sum(seat.episode is not None for seat in seats))

    def _seat_next(self, seat: _Seat, waiting: deque[Episode]) -> None:
        seat.episode = waiting.popleft() if waiting else None
        seat.observation = seat.pending = None
        if seat.episode:
            seat.pending = self._pool.reset(seat.slot, seat.episode.task)

    def _collect(self, seat: _Seat, waiting: deque[Episode]) -> bool:
        """Take in what the environment answered. False where the episode is over and the seat was given to another."""
        assert seat.episode is not None
        assert seat.pending is not None
        start = time.perf_counter()
        try:
            answer = seat.pending.result()
        except EnvironmentFailure as failure:
            seat.episode.failed, seat.episode.finish = True, str(failure)
            self._seat_next(seat, waiting)
            return False
        finally:
            self.seconds["environment"] += time.perf_counter() - start
        if isinstance(answer, Observation):
            seat.observation = answer
            return True
        self._record(seat.episode, answer)
        if seat.episode.finish:
            self._seat_next(seat, waiting)
            return False
        seat.observation = answer.observation
        return True

    def _record(self, episode: Episode, result: StepResult) -> None:
        turn = episode.turns[-1]
        turn.reward, turn.valid, turn.result = result.reward, result.valid, result.observation.text
        episode.score, episode.success = result.score, result.success
        episode.official_success = result.official_success
        if result.done:
            episode.finish = "done"
        elif len(episode.turns) >= self._max_turns:
            episode.finish = "max_turns"

    def _act(self, seats: Sequence[_Seat]) -> None:
        """One turn of each seat: prompt, response, action; the environments' answers are left pending."""
        start = time.perf_counter()
        live = [(s, s.episode, s.observation) for s in seats if s.episode and s.observation]
        prompts = self._prompts.encode([(observation, episode.turns) for _, episode, observation in live])
        completions = self._engine.generate(
            [
                Request(prompt, (*episode.seed, len(episode.turns)), episode.greedy)
                for prompt, (_, episode, _) in zip(prompts, live, strict=True)
            ]
        )
        texts = self._policy.tokenizer.batch_decode([c.token_ids for c in completions], skip_special_tokens=True)
        self.seconds["model"] += time.perf_counter() - start
        for (seat, episode, observation), prompt, completion, text in zip(
            live, prompts, completions, texts, strict=True
        ):
            # What holds no action goes out as an empty one, which no environment understands.
            action = parse_action(text, self._response_format) or ""
            episode.turns.append(Turn(observation, prompt, completion.token_ids, completion.log_probs, action))
            seat.pending = self._pool.step(seat.slot, action)
