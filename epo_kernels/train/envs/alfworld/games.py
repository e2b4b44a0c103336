"""Generates ALFWorld games offline, from the data in the package alfworld:

    python -m epo_kernels.train.envs.alfworld.games OUT_DIR [--train N] [--seen N] [--unseen N] [--seed S]

They are games for the real engine in the layout of the real data, to be used with ALFWORLD_DATA=OUT_DIR: all six task
types in kitchens, bathrooms, bedrooms and living rooms of 6 to 10 places. ALFRED's rooms have 15 to 40 places, so these
games are easier. The furniture is fixed per scene; each game has its own objects and positions. Games of valid_seen use
scenes of train, games of valid_unseen use ALFRED's test scenes. Every game's plan was played and won.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from epo_kernels.train.envs.workers import Worker

ENGINE = "epo_kernels.train.envs.alfworld.engine:Engine"
DATA = "json_2.1.1"  # the folder inside ALFWORLD_DATA
PANELS = {"train": "train", "iid": "valid_seen", "ood": "valid_unseen"}
TASK_NAMES = (
    "pick_and_place_simple",
    "look_at_obj_in_light",
    "pick_clean_then_place_in_recep",
    "pick_heat_then_place_in_recep",
    "pick_cool_then_place_in_recep",
    "pick_two_obj_and_place",
)
EMBEDDED_COUNTS = {"train": 48, "iid": 24, "ood": 24}
AUTHOR_TIMEOUT = 300.0  # seconds to plan and play a game; typically half a second


@dataclass(frozen=True)
class _Room:
    """What a kind of room can contain. The first `needed` places are in every such room."""

    scenes: int  # ALFRED's scene numbers start after this
    needed: int
    places: str  # types, separated by spaces
    objects: str


ROOMS = {
    "Kitchen": _Room(
        0,
        4,
        "Fridge Microwave SinkBasin CounterTop Cabinet Cabinet Drawer Drawer Shelf GarbageCan",
        "Apple Bread Egg Lettuce Potato Tomato Mug Cup Bowl Plate Fork Spoon Knife ButterKnife Spatula Ladle Pan "
        "Pot SaltShaker PepperShaker DishSponge",
    ),
    "LivingRoom": _Room(
        200,
        2,
        "Dresser Sofa ArmChair ArmChair Ottoman Shelf Shelf Drawer Drawer Cabinet Safe",
        "Book Newspaper RemoteControl CreditCard KeyChain Laptop Vase Statue Watch WateringCan Candle TissueBox",
    ),
    "Bedroom": _Room(
        300,
        2,
        "Desk Bed Dresser Shelf Shelf Drawer Drawer Drawer Safe GarbageCan",
        "Book Pen Pencil CD CellPhone CreditCard KeyChain AlarmClock Laptop Mug Watch TissueBox",
    ),
    "Bathroom": _Room(
        400,
        3,
        "SinkBasin Toilet CounterTop Cabinet Cabinet Drawer Shelf GarbageCan BathtubBasin",
        "Cloth SoapBar SoapBottle SprayBottle ToiletPaper Candle TissueBox DishSponge",
    ),
}
LAMPS = {"LivingRoom": "FloorLamp", "Bedroom": "DeskLamp"}  # placed on the room's first place
DEVICES = {"clean": "SinkBasin", "heat": "Microwave", "cool": "Fridge"}


@dataclass(frozen=True)
class _Game:
    folder: str
    room: dict[str, Any]
    task: dict[str, Any]
    seed: int


def author_games(
    out: Path, counts: dict[str, int], seed: int, report: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write `counts` games of "train", "iid" and "ood" to `out`, all or none; the same seed gives the same games.

    Args:
        out: a folder that does not contain json_2.1.1 yet.

    Raises:
        ValueError: no games requested, or games already exist.
        EnvironmentFailure: the engine does not start, or failed.
    """
    target = out / DATA
    if target.exists():
        raise ValueError(f"{target} exists already; name another folder or delete it")
    if min(counts.values()) < 1:
        raise ValueError(f"each panel needs at least one game, got {counts}")
    out.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=out, prefix=".unfinished-"))
    workers: SimpleQueue[Worker] = SimpleQueue()
    started: list[Worker] = []
    try:
        for _ in range(2):
            started.append(start_engine(unfinished, AUTHOR_TIMEOUT))
            workers.put(started[-1])
        games = _design(started[0].call("rules", AUTHOR_TIMEOUT), counts, seed)
        with ThreadPoolExecutor(len(started)) as threads:
            written = threads.map(lambda game: _write(game, unfinished, workers), games)
            for number, _ in enumerate(written, 1):
                report(number, len(games))
        if not target.exists():  # another process may have written the same games first
            os.replace(unfinished, target)
    finally:
        for worker in started:
            worker.close()
        shutil.rmtree(unfinished, ignore_errors=True)


def start_engine(data: Path, timeout: float) -> Worker:
    """An ALFWorld engine with ALFWORLD_DATA=`data` (unset, it would create a folder in the home folder)."""
    return Worker(ENGINE, "an ALFWorld engine", timeout, {"ALFWORLD_DATA": str(data), "PYTHONHASHSEED": "0"})


def _write(game: _Game, root: Path, workers: "SimpleQueue[Worker]") -> None:
    folder = root / game.folder
    folder.mkdir(parents=True)
    worker = workers.get()
    try:
        played = worker.call("author", AUTHOR_TIMEOUT, path=str(folder), room=game.room, task=game.task, seed=game.seed)
    finally:
        workers.put(worker)
    if not played["won"]:
        raise RuntimeError(f"{game.folder} cannot be won by {played['walkthrough']}: a bug in the generator")


def _design(rules: dict[str, Any], counts: dict[str, int], seed: int) -> list[_Game]:
    """Games of all panels, with alternating task types and no two alike."""
    games, seen = [], set()
    for split, count in counts.items():
        for index in range(count):
            name = TASK_NAMES[index % len(TASK_NAMES)]
            for attempt in range(1000):
                rng = random.Random(f"{seed}/{split}/{index}/{attempt}")
                scenes = rules["scenes"]["test" if split == "ood" else "train"]
                kind = rng.choice(rules["rooms"][name])
                scene = rng.choice([s for s in scenes if ROOMS[kind].scenes < s <= ROOMS[kind].scenes + 30])
                room, task = _furnish(name, kind, random.Random(f"{seed}/{scene}"), rng, rules)
                if task and (key := repr((scene, room, task))) not in seen:
                    break
            else:
                raise ValueError(f"only {index} different games of {split} can be generated; ask for fewer")
            seen.add(key)
            targets = task["pddl_params"]
            place = targets["parent_target"] or targets["toggle_target"]
            folder = f"{PANELS[split]}/{name}-{targets['object_target']}-None-{place}-{scene}/trial_T{index:04}"
            games.append(_Game(folder, room, task, rng.randrange(2**31)))
    return games


def _furnish(
    name: str, kind: str, scene: random.Random, rng: random.Random, rules: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """A room and a task in it; an empty task if this draw allows none.

    Args:
        name: the task type; kind: the kind of room.
        scene: random draws shared by all games of the scene; rng: draws of this game.
    """
    furniture = ROOMS[kind]
    needed, optional = furniture.places.split()[: furniture.needed], furniture.places.split()[furniture.needed :]
    things = furniture.objects.split()
    types = [*needed, *scene.sample(optional, scene.randint(4, min(6, len(optional))))]
    places = {_identifier(place, types[:i].count(place) + 1): place for i, place in enumerate(types)}
    fits = rules["fits"]
    verb = next((verb for verb in DEVICES if f"_{verb}_" in name), None)
    light = name == "look_at_obj_in_light"
    target = rng.choice([o for o in things if verb is None or o in rules["can"][verb]])
    goal = "" if light else rng.choice(sorted(set(types)))
    if goal and (target not in fits[goal] or (verb and goal == DEVICES[verb])):
        return {}, {}
    wanted = 2 if name == "pick_two_obj_and_place" else 1
    others = rng.sample([o for o in things if o != target], rng.randint(4, 6))
    held: dict[str, list[str]] = {}
    if light:
        held[f"{LAMPS[kind].lower()}_bar_1"] = [LAMPS[kind], next(iter(places))]
    for thing in [target] * wanted + others:
        # A target already at its goal would win before the first action.
        room_for = [p for p, place in places.items() if thing in fits[place] and (thing != target or place != goal)]
        if not room_for:
            return {}, {}
        number = sum(kind == thing for kind, _ in held.values()) + 1
        held[f"{thing.lower()}_bar_{number}"] = [thing, rng.choice(room_for)]
    targets: dict[str, str | bool] = {"object_target": target, "parent_target": goal, "mrecep_target": ""}
    targets |= {"toggle_target": LAMPS[kind] if light else "", "object_sliced": False}
    return {"places": places, "objects": held}, {"task_type": name, "pddl_params": targets}


def _identifier(place: str, number: int) -> str:
    """As in ALFRED, where a basin is part of its sink: the package names places by the part before "_bar_"."""
    name = place.lower().removesuffix("basin")
    return f"{name}_bar_{number}" + ("_bar_basin" if place.endswith("Basin") else "")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m epo_kernels.train.envs.alfworld.games", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="output folder, to be used as ALFWORLD_DATA")
    for option, split in (("train", "train"), ("seen", "iid"), ("unseen", "ood")):
        default = EMBEDDED_COUNTS[split]
        parser.add_argument(f"--{option}", type=int, default=default, metavar="N", help=f"games (default {default})")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    given = parser.parse_args()
    counts = {"train": given.train, "iid": given.seen, "ood": given.unseen}

    def report(done: int, total: int) -> None:
        sys.stdout.write(f"\r{done} of {total} games" + ("\n" if done == total else ""))
        sys.stdout.flush()

    try:
        author_games(given.out, counts, given.seed, report)
    except (ValueError, RuntimeError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"play them with: ALFWORLD_DATA={given.out}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
