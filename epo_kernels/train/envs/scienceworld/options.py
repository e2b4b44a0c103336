"""ScienceWorld's own settings, importable without its package."""

import re
from dataclasses import dataclass

from epo_kernels.train.envs.base import check_task_names
from epo_kernels.train.setting import BELOW_ONE, Rule, at_least, one_of, require, setting

SIMPLIFICATIONS = (
    "easy",
    "noElectricalAction",
    "openContainers",
    "openDoors",
    "selfWateringFlowerPots",
    "teleportAction",
)
SIZE = Rule("a size such as 256m or 1g", lambda value: re.fullmatch(r"\d+[kmgKMG]", value) is not None)


@dataclass
class ScienceWorldOptions:
    """ScienceWorld: its experiments, and how they are simulated and rewarded."""

    task_names: list[str] = setting(["find-non-living-thing"], "task types of train and iid")
    ood_task_names: list[str] = setting([], "held-out task types, of ood")
    simplification: str = setting("easy", 'comma-separated simplifications; "": none')
    tick_limit: int = setting(100, "simulated moves per episode; the published limit is 100", at_least(1))
    progress_reward: float = setting(0.1, "share of the return that rewards partial score", BELOW_ONE)
    scene: str = setting("full", "what an observation shows of a room", one_of("full", "animals"))
    jvm_memory: str = setting("256m", "heap limit of each JVM (-Xmx)", SIZE, resume="free")

    def check(self) -> None:
        check_task_names(self.task_names, self.ood_task_names)
        used = [part for part in self.simplification.split(",") if part]
        unknown = [part for part in used if part not in SIMPLIFICATIONS]
        require(not unknown, f"env.options.simplification: {unknown} is none of {', '.join(SIMPLIFICATIONS)}")
        for name in [*self.task_names, *self.ood_task_names]:
            is_electrical = "power-component" in name or "conductivity" in name
            require(
                not is_electrical or "noElectricalAction" not in used,
                f"env.options.simplification=noElectricalAction makes {name} impossible; remove one of them",
            )
