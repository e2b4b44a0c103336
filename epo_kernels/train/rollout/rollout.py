"""The rollout: plays episodes in alternating cohorts or as a stream, depending on the engine."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

from epo_kernels.train.data import Episode, Turn
from epo_kernels.train.envs import EnvironmentFailure, Observation, StepResult
from epo_kernels.train.envs.pool import EnvironmentPool
from epo_kernels.train.io.progress import Report, ignore
from epo_kernels.train.models.policy import Policy
from epo_kernels.train.rollout.engine import Completion, Engine, Request, StreamingEngine
from epo_kernels.train.rollout.prompts import Prompts, parse_action

PATIENCE = 2e-4  # seconds


@dataclass
class _Seat:
    """An environment slot and the episode being played in it."""

    slot: int
    episode: Episode | None = None
    observation: Observation | None = None
    pending: Future[Any] | None = None


@dataclass
class Rollout:
    """Plays episodes with the current weights.

    An `Engine` generates for whole cohorts. Cohorts alternate in a fixed order, and each waits only for its own
    environments, so batches depend on the episodes and never on timing: the same seed gives the same batches.

    A `StreamingEngine` receives each prompt as soon as its environment has answered, so no episode waits for the
    slowest. Batches then depend on timing; draws do not, but their log-probs may be rounded differently.
    """

    pool: EnvironmentPool
    policy: Policy  # its tokenizer decodes the engine's tokens
    engine: Engine | StreamingEngine
    prompts: Prompts
    max_turns: int
    cohorts: int  # number of cohorts, for an `Engine`
    response_format: str
    seconds: dict[str, float] = field(init=False)  # time of the last `play`: generating, waiting for environments

    def __post_init__(self) -> None:
        self.seconds = {"model": 0.0, "environment": 0.0}

    def prefetch(self, episodes: Sequence[Episode]) -> None:
        """Start to reset environments for the next `play` of these episodes, in the background."""
        self.pool.prefetch([episode.task for episode in episodes[: self.pool.size]])

    def play(self, episodes: Sequence[Episode], report: Report = ignore) -> None:
        """Play each episode to its end, filling in its turns and outcome.

        `report` receives the number of finished episodes; unfinished ones count by their share of `max_turns`.

        If its environment fails, an episode is marked `failed`, with the reason in `finish`.
        """
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        with self.engine.awake() if isinstance(self.engine, StreamingEngine) else nullcontext():
            self._play(episodes, report)

    def _play(self, episodes: Sequence[Episode], report: Report) -> None:
        waiting = deque(episodes)
        seats = [_Seat(slot) for slot in range(min(self.pool.size, len(episodes)))]
        for seat in seats:
            self._seat_next(seat, waiting)

        def progress() -> None:
            # Unfinished episodes count by turns, because equally long episodes all finish at once.
            under_way = [len(seat.episode.turns) / self.max_turns for seat in seats if seat.episode]
            report(len(episodes) - len(waiting) - len(under_way) + sum(under_way))

        if isinstance(self.engine, StreamingEngine):
            self._play_as_stream(self.engine, seats, waiting, progress)
        else:
            self._play_in_cohorts(self.engine, seats, waiting, progress)

    def _play_in_cohorts(
        self, engine: Engine, seats: list[_Seat], waiting: deque[Episode], progress: Callable[[], None]
    ) -> None:
        cohorts = [seats[i :: self.cohorts] for i in range(self.cohorts)]
        while any(seat.episode for seat in seats):
            for cohort in cohorts:
                ready = [seat for seat in cohort if seat.episode and self._collect(seat, waiting)]
                if ready:
                    start = time.perf_counter()
                    requests = self._requests(ready)
                    texts = self._texts(completions := engine.generate(requests))
                    self.seconds["model"] += time.perf_counter() - start
                    for seat, request, completion, text in zip(ready, requests, completions, texts, strict=True):
                        self._act(seat, request, completion, text)
            progress()

    def _play_as_stream(
        self, engine: StreamingEngine, seats: list[_Seat], waiting: deque[Episode], progress: Callable[[], None]
    ) -> None:
        answered: SimpleQueue[_Seat] = SimpleQueue()  # seats whose environment has answered
        asked: dict[int, Request] = {}  # requests in progress, by slot
        for seat in seats:
            _tell_when_answered(seat, answered)
        while live := sum(seat.episode is not None for seat in seats):
            ready = []
            for seat in self._next_answered(answered, live - len(asked), wait=not asked):
                if self._collect(seat, waiting):
                    ready.append(seat)
                else:
                    _tell_when_answered(seat, answered)
            start = time.perf_counter()
            if ready:
                fresh = {seat.slot: request for seat, request in zip(ready, self._requests(ready), strict=True)}
                engine.submit(fresh)
                asked |= fresh
            finished = engine.advance() if asked else []
            texts = self._texts([completion for _, completion in finished])
            self.seconds["model"] += time.perf_counter() - start
            for (slot, completion), text in zip(finished, texts, strict=True):
                self._act(seats[slot], asked.pop(slot), completion, text)
                _tell_when_answered(seats[slot], answered)
            progress()

    def _next_answered(self, answered: SimpleQueue[_Seat], acting: int, wait: bool) -> list[_Seat]:
        """The seats whose environment has answered; with `wait` at least one.

        Waits a moment longer while answers arrive in quick succession, because an engine step is more expensive.
        """
        start = time.perf_counter()
        seats = [answered.get()] if wait else []
        while len(seats) < acting:
            try:
                seats.append(answered.get(timeout=PATIENCE))
            except Empty:
                break
        self.seconds["environment"] += time.perf_counter() - start
        return seats

    def _seat_next(self, seat: _Seat, waiting: deque[Episode]) -> None:
        seat.episode = waiting.popleft() if waiting else None
        seat.observation = seat.pending = None
        if seat.episode:
            seat.pending = self.pool.reset(seat.slot, seat.episode.task)

    def _collect(self, seat: _Seat, waiting: deque[Episode]) -> bool:
        """Process the environment's answer. False if the episode is over and the seat was reassigned."""
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
        elif len(episode.turns) >= self.max_turns:
            episode.finish = "max_turns"

    def _requests(self, seats: Sequence[_Seat]) -> list[Request]:
        """Requests for the seats that have an observation."""
        live = [(s.episode, s.observation) for s in seats if s.episode and s.observation]
        prompts = self.prompts.encode([(observation, episode.turns) for episode, observation in live])
        return [
            Request(prompt, (*episode.seed, len(episode.turns)), episode.greedy)
            for prompt, (episode, _) in zip(prompts, live, strict=True)
        ]

    def _texts(self, completions: Sequence[Completion]) -> list[str]:
        if not completions:  # the tokenizer would turn an empty list into one empty text
            return []
        return self.policy.read([c.token_ids for c in completions])

    def _response(self, token_ids: list[int]) -> str:
        """As generated, including special tokens, for human readers; only the end token is removed."""
        ended = token_ids[-1:] and token_ids[-1] in self.policy.end_ids
        return str(self.policy.tokenizer.decode(token_ids[:-1] if ended else token_ids))

    def _act(self, seat: _Seat, request: Request, completion: Completion, text: str) -> None:
        """Send the policy's action to the environment, whose answer stays pending."""
        assert seat.episode is not None
        assert seat.observation is not None
        # A response without an action is sent as an empty action, which no environment understands.
        action = parse_action(self.policy.chat.opening + text, self.response_format) or ""
        turn = Turn(
            seat.observation,
            request.prompt_ids,
            completion.token_ids,
            completion.log_probs,
            action,
            response=self._response(completion.token_ids),
            finish=completion.finish,
        )
        seat.episode.turns.append(turn)
        seat.pending = self.pool.step(seat.slot, action)


def _tell_when_answered(seat: _Seat, answered: SimpleQueue[_Seat]) -> None:
    if seat.pending:
        seat.pending.add_done_callback(lambda _: answered.put(seat))
