"""Regenerates the frozen demonstrations and the tokenizer of `make train`: make quickstart-data.

Each of the 62 training variations of ScienceWorld's `lifespan-longest-lived` is demonstrated once for each of the three
visible animals: the simulator's own gold walk to them, then `focus on` that animal. One third of the demonstrations
therefore succeed, and they do not reveal which animal lives longest. Everything is played in the real simulator.

The simulator finds a different gold walk at each call, so new files are equivalent to the old ones but not identical.
"""

import sys

from epo_kernels.train.config import load_config
from epo_kernels.train.envs import Demonstration, Environment, Suite, Task, make_suite
from epo_kernels.train.envs.demonstrations import freeze, frozen_folder, play
from epo_kernels.train.envs.scienceworld.text import is_animal
from epo_kernels.train.models.policy import train_tokenizer


def main() -> int:
    config = load_config("quickstart", [])
    suite = make_suite(config.env)
    try:
        tasks = suite.tasks("train")
        environment = suite.make()
        demonstrations = [shown for task in tasks for shown in every_choice(suite, environment, task)]
        environment.close()
    finally:
        suite.close()
    folder = frozen_folder("quickstart")
    freeze(folder, demonstrations)
    train_tokenizer(demonstrations).save_pretrained(folder)
    wins = sum(demonstration.score == 100 for demonstration in demonstrations)
    print(f"{len(demonstrations)} demonstrations, {wins} of them successful, and their tokenizer: {folder}")
    return 0


def every_choice(suite: Suite, environment: Environment, task: Task) -> list[Demonstration]:
    """The gold walk of a task, followed by each visible animal."""
    gold = suite.demonstrate(task)
    things = gold.observations[-1].scene.split(": ")[1].split(". Doors")[0].split(", ")
    walk = gold.actions[:-1]
    return [play(environment, task, [*walk, f"focus on {thing}"])[0] for thing in things if is_animal(thing)]


if __name__ == "__main__":
    sys.exit(main())
