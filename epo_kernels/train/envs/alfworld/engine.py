"""ALFWorld's engine. TextWorld's PDDL games keep global state, so each engine runs in its own process, a `Worker`."""

import json
import os
import random
import sys

import alfworld.gen.constants as constants
import alfworld.gen.goal_library as goals
import textworld
from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredExpert
from alfworld.agents.utils.misc import add_task_to_grammar
from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH

EXPERT_STEPS = 200  # the package's own expert gives up after this
ABILITIES = {"clean": ("Cleanable", "cleanable"), "heat": ("Heatable", "heatable"), "cool": ("Coolable", "coolable")}


def tell_rules() -> dict:
    """The package's rules: which object types fit where, and what can be cleaned, heated, cooled or opened."""
    return {
        "fits": {place: sorted(objects) for place, objects in constants.VAL_RECEPTACLE_OBJECTS.items()},
        "can": {verb: sorted(constants.VAL_ACTION_OBJECTS[name]) for verb, (name, _) in ABILITIES.items()},
        "openable": sorted(constants.OPENABLE_CLASS_LIST),
        "rooms": {goal: sorted(rooms) for goal, rooms in constants.GOALS_VALID.items()},
        "scenes": {"train": constants.TRAIN_SCENE_NUMBERS, "test": constants.TEST_SCENE_NUMBERS},
    }


class Player:
    """The game being played."""

    def __init__(self) -> None:
        self._environment: textworld.Environment | None = None
        self._path = ""

    def reset(self, path: str) -> dict:
        if self._environment is None or path != self._path:
            self._environment = _start(path, [AlfredDemangler()])
            self._path = path
        return _shown(self._environment.reset())

    def step(self, action: str) -> dict:
        assert self._environment is not None, "call reset first"
        state, _, _ = self._environment.step(action)
        return _shown(state)


def _start(path: str, wrappers: list) -> textworld.Environment:
    infos = textworld.EnvInfos(feedback=True, won=True, admissible_commands=True, facts=True)
    return textworld.start(path, infos, wrappers=wrappers)


def _shown(state: textworld.GameState) -> dict:
    commands = list(state["admissible_commands"])
    return {"feedback": state["feedback"], "won": bool(state["won"]), "commands": commands}


def expert_actions(path: str) -> list[str]:
    """The actions of the package's hand-written expert, which explores like an agent; [] if it gives up."""
    random.seed(0)
    environment = _start(path, [AlfredDemangler(), AlfredExpert])
    actions: list[str] = []
    try:
        state = environment.reset()
        while not state["won"] and len(actions) < EXPERT_STEPS:
            action = state["extra.expert_plan"][0]
            actions.append(action)
            state, _, _ = environment.step(action)
    except Exception as error:  # it raises bare Exceptions and NameErrors when it gives up
        sys.stderr.write(f"the expert gave up on {path}: {error}\n")
        return []
    return actions if state["won"] else []


def planned_actions(path: str) -> list[str]:
    """A plan by Fast Downward, which knows the location of everything; [] if there is none."""
    environment = _start(path, [AlfredDemangler()])
    environment.reset()
    inner = environment.unwrapped
    return inner._pddl_state.replan(inner._entity_infos)


def author(path: str, room: dict, task: dict, seed: int) -> dict:
    """Write a game into the folder `path`, plan it, and play the plan.

    Args:
        room: {"places": {id: type}, "objects": {id: [type, id of its place]}}.
        task: ALFRED's traj_data: task_type and pddl_params.
        seed: selects the wording of the task.

    Returns:
        {"won": whether the plan won, "walkthrough": its actions}.
    """
    with open(ALFRED_PDDL_PATH) as domain, open(ALFRED_TWL2_PATH) as grammar:
        game: dict = {"pddl_domain": domain.read(), "grammar": grammar.read()}
    random.seed(seed)
    game["grammar"] = add_task_to_grammar(game["grammar"], task)
    game["pddl_problem"] = _problem(room, task)
    _write(path, "traj_data.json", task)
    file = _write(path, "game.tw-pddl", game)
    game["walkthrough"] = planned_actions(file)
    player = Player()
    shown = player.reset(file)
    for action in game["walkthrough"]:
        shown = player.step(action)
    game["solvable"] = shown["won"]
    _write(path, "game.tw-pddl", game)
    return {"won": shown["won"], "walkthrough": game["walkthrough"]}


def _write(folder: str, name: str, content: dict) -> str:
    path = os.path.join(folder, name)
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file)
    return path


def _problem(room: dict, task: dict) -> str:
    """The room and the goal in PDDL. Each place has its own location; the agent starts at none of them."""
    places, objects, abilities = room["places"], room["objects"], constants.VAL_ACTION_OBJECTS
    place_types, object_types = sorted(set(places.values())), sorted({kind for kind, _ in objects.values()})
    location = {place: f"loc{number}" for number, place in enumerate(places, 1)}
    declared = ["agent1 - agent", "loc0 - location", *(f"{name} - location" for name in location.values())]
    # The domain uses these constants without declaring them.
    declared += [f"{kind}Type - rtype" for kind in sorted({*place_types, "SinkBasin", "Microwave", "Fridge"})]
    declared += [f"{kind}Type - otype" for kind in sorted({*object_types, "Knife", "ButterKnife"})]
    declared += [f"{place} - receptacle" for place in places] + [f"{thing} - object" for thing in objects]
    facts = ["(= (total-cost) 0)", "(atLocation agent1 loc0)"]
    for place, kind in places.items():
        facts += [f"(receptacleType {place} {kind}Type)", f"(receptacleAtLocation {place} {location[place]})"]
        if kind in constants.OPENABLE_CLASS_LIST:
            facts.append(f"(openable {place})")
    for kind in place_types:
        fitting = constants.VAL_RECEPTACLE_OBJECTS[kind]
        facts += [f"(canContain {kind}Type {thing}Type)" for thing in object_types if thing in fitting]
    for thing, (kind, place) in objects.items():
        facts += [f"(objectType {thing} {kind}Type)", f"(inReceptacle {thing} {place})"]
        facts.append(f"(objectAtLocation {thing} {location[place]})")
        facts.append(f"({'toggleable' if kind in abilities['Toggleable'] else 'pickupable'} {thing})")
        facts += [f"({fact} {thing})" for name, fact in ABILITIES.values() if kind in abilities[name]]
    targets = task["pddl_params"]
    goal = goals.gdict[task["task_type"]]["pddl"].format(
        obj=targets["object_target"], recep=targets["parent_target"], toggle=targets["toggle_target"]
    )
    objects_text, facts_text = "\n".join(declared), "\n".join(facts)
    return (
        f"(define (problem room) (:domain alfred)\n(:objects\n{objects_text}\n)\n(:init\n{facts_text}\n)\n"
        f"{goal.replace('#', '-')}\n"
    )


class Engine(Player):
    """The object that a `Worker` serves."""

    rules = staticmethod(tell_rules)
    expert = staticmethod(expert_actions)
    plan = staticmethod(planned_actions)
    author = staticmethod(author)
