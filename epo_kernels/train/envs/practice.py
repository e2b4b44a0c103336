"""A walk to a vault: no dependencies, microseconds per step, and a typical trap of long-horizon agents.

Every room has a sign, and each sign stands for a direction (`WAYS`); at night left and right are swapped. After
`length` correct turns the vault opens with reward 1; there is no reward before. In many rooms metal glints in a wrong
direction. Gold pays 0.1 once and ends the episode. Silver pays 0.03 and leads back, but the vault then stays shut. A
policy that converges early on following the glint is rewarded immediately and can never win. Any other wrong direction
costs one of `spare_turns`: if the meaning of a sign is unknown, trying another direction helps and repeating does not.

Signs have different frequencies, so a policy cloned from a few demonstrations knows only the common ones. "walk" is the
training task. "long-walk", the out-of-distribution panel, is half as long again, with uniform sign frequencies and as
many nights as days. An episode is fully determined by its Task and the configuration.

The demonstrator is a setting. The "expert" reads every sign correctly, so perfect imitation is enough. The "novice"
knows the signs only by day: at night it picks a uniformly random direction, retries after a dead end, and is caught by
gold as often as chance has it. Its episodes are shown whatever their outcome. Perfect imitation therefore wins no more
often than the novice, however many demonstrations there are, and the meaning of night can only be learned from reward.
"""

import random
from dataclasses import dataclass

from epo_kernels.train.envs.base import (
    SPLITS,
    Demonstration,
    EnvConfig,
    Environment,
    Observation,
    StepResult,
    Task,
    check_task_names,
    unknown_task_name,
)
from epo_kernels.train.envs.suite import Suite
from epo_kernels.train.setting import SHARE, Rule, at_least, one_of, require, setting

WAYS = {  # direction of each sign by day, most frequent first
    "sun": "left",
    "tree": "ahead",
    "fish": "right",
    "moon": "right",
    "bell": "left",
    "star": "ahead",
    "rose": "right",
    "ship": "left",
    "bird": "ahead",
    "crown": "left",
    "key": "right",
    "wolf": "ahead",
}
SWAPPED = {"left": "right", "right": "left", "ahead": "ahead"}
ACTIONS = ("go left", "go right", "go ahead")
REWARDS = {"gold": 0.1, "silver": 0.03, "vault": 1.0}

TRAIN_VARIATIONS = range(0, 512)
IID_VARIATIONS = range(512, 1024)
OOD_VARIATIONS = range(0, 512)


@dataclass(frozen=True)
class Kind:
    """A task type."""

    stretch: float  # length relative to the configured one
    night: float  # share of rooms at night
    decay: float  # how much rarer each sign is than the previous one


KINDS = {"walk": Kind(stretch=1, night=0.3, decay=0.75), "long-walk": Kind(stretch=1.5, night=0.5, decay=1)}


@dataclass
class PracticeOptions:
    """The walk to the vault: its task types and difficulty."""

    task_names: list[str] = setting(["walk"], "task types of train and iid", one_of(*KINDS))
    ood_task_names: list[str] = setting(["long-walk"], "held-out task types, of ood", one_of(*KINDS))
    length: int = setting(32, "rooms to the vault, each with one correct turn", at_least(1))
    spare_turns: int = setting(8, "wrong turns that the time limit allows", at_least(0))
    signs: int = setting(
        10, "kinds of signs, 1 to 12; later ones are rarer", Rule("1 to 12", lambda value: 1 <= value <= len(WAYS))
    )
    temptation: float = setting(0.5, "share of rooms with a shortcut", SHARE)
    demonstrator: str = setting(
        "expert", "demonstrator; the novice knows the signs only by day", one_of("expert", "novice")
    )

    def check(self) -> None:
        check_task_names(self.task_names, self.ood_task_names)
        require(bool(self.ood_task_names), "env.options.ood_task_names must name at least one task type")


@dataclass(frozen=True)
class Room:
    sign: str
    night: bool
    glint: str | None = None  # "gold" or "silver"
    glint_way: str | None = None

    @property
    def way(self) -> str:
        """The correct direction."""
        return SWAPPED[WAYS[self.sign]] if self.night else WAYS[self.sign]

    def describe(self) -> str:
        glint = f" {self.glint.capitalize()} glints {self.glint_way}." if self.glint else ""
        return f"Sign: {self.sign}, by {'night' if self.night else 'day'}.{glint}"


def rooms(task: Task, config: PracticeOptions) -> list[Room]:
    """The rooms of an episode, in order.

    Raises:
        ValueError: unknown task type.
    """
    kind = KINDS.get(task.name)
    if kind is None:
        raise ValueError(unknown_task_name("practice", task.name, list(KINDS)))
    generator = random.Random(f"{task.name}/{task.variation}/{task.seed}")
    signs = list(WAYS)[: config.signs]
    frequencies = [kind.decay**rank for rank in range(len(signs))]
    made = []
    for sign in generator.choices(signs, frequencies, k=round(kind.stretch * config.length)):
        room = Room(sign, night=generator.random() < kind.night)
        if generator.random() < config.temptation:
            wrong = generator.choice([way for way in ("left", "right", "ahead") if way != room.way])
            room = Room(sign, room.night, generator.choice(["gold", "silver"]), wrong)
        made.append(room)
    return made


class PracticeEnvironment(Environment):
    """Plays one walk at a time."""

    def __init__(self, config: PracticeOptions) -> None:
        self._config = config
        self._rooms: list[Room] = []
        self._done = True

    def reset(self, task: Task) -> Observation:
        """Raises ValueError for an unknown task type."""
        self._rooms = rooms(task, self._config)
        self._passed = 0
        self._turns_left = len(self._rooms) + self._config.spare_turns
        self._is_thief = False
        self._done = False
        return self._observe("You enter.")

    def step(self, action: str) -> StepResult:
        """Play one of ACTIONS; anything else costs a turn.

        Raises:
            RuntimeError: the episode is over.
        """
        if self._done:
            raise RuntimeError("the episode is over (or never began): reset the environment first")
        action = " ".join((action or "").lower().split())
        self._turns_left -= 1
        valid = action in ACTIONS
        answer, reward = self._go(action.removeprefix("go ")) if valid else ("That is no way.", 0.0)
        success = self._passed == len(self._rooms) and not self._is_thief
        if self._turns_left == 0 and not self._done:
            answer, self._done = f"{answer} Time is up.", True
        score = 100.0 if success else min(99.0, 100 * self._passed / len(self._rooms))
        return StepResult(
            observation=self._observe(answer),
            reward=reward,
            done=self._done,
            score=score,
            success=success,
            valid=valid,
        )

    def close(self) -> None:
        self._done = True

    def _go(self, way: str) -> tuple[str, float]:
        room = self._rooms[self._passed]
        if way == room.way:
            self._passed += 1
            if self._passed < len(self._rooms):
                return "You walk on.", 0.0
            self._done = True
            return ("The vault stays shut.", 0.0) if self._is_thief else ("The vault opens.", REWARDS["vault"])
        if way != room.glint_way:
            return "A dead end, you come back.", 0.0
        if room.glint == "gold":
            self._done = True
            return "You take the gold. A trap shuts.", REWARDS["gold"]
        if self._is_thief:
            return "Nothing is left there, you come back.", 0.0
        self._is_thief = True
        return "You take the silver, you come back.", REWARDS["silver"]

    def _observe(self, answer: str) -> Observation:
        goal = f"Follow the signs through {len(self._rooms)} rooms to the vault."
        here = "" if self._done else self._rooms[self._passed].describe()
        return Observation(goal, answer, here, actions=() if self._done else ACTIONS)


class PracticeSuite(Suite):
    """Walks: "train" and "iid" differ in their variations, "ood" is longer and harder."""

    Options = PracticeOptions
    panels = ("iid", "ood", "train")
    lists_actions = True

    def __init__(self, config: EnvConfig) -> None:
        super().__init__(config)
        self._options: PracticeOptions = config.options
        names, held_out = self._options.task_names, self._options.ood_task_names
        self._names = {"train": names, "iid": names, "ood": held_out}

    @classmethod
    def turn_limit(cls, config: EnvConfig) -> int:
        if config.max_turns is not None:
            return config.max_turns
        options: PracticeOptions = config.options
        names = (*options.task_names, *options.ood_task_names)
        return max(round(KINDS[name].stretch * options.length) for name in names) + options.spare_turns

    def tasks(self, split: str) -> list[Task]:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {split!r}")
        variations = {"train": TRAIN_VARIATIONS, "iid": IID_VARIATIONS, "ood": OOD_VARIATIONS}[split]
        return [Task(name, variation) for variation in variations for name in self._names[split]]

    def make(self) -> PracticeEnvironment:
        return PracticeEnvironment(self._options)

    def demonstrate(self, task: Task) -> Demonstration:
        """The demonstrator's episode, whatever its outcome; deterministic for each task."""
        walk, environment = rooms(task, self._options), self.make()
        generator = random.Random(f"novice/{task.name}/{task.variation}/{task.seed}")
        is_novice = self._options.demonstrator == "novice"
        observations, actions, passed = [environment.reset(task)], [], 0
        while True:
            room = walk[passed]
            actions.append(generator.choice(ACTIONS) if is_novice and room.night else f"go {room.way}")
            result = environment.step(actions[-1])
            if result.done:
                return Demonstration(task, observations, actions, result.score)
            observations.append(result.observation)
            passed += actions[-1] == f"go {room.way}"
