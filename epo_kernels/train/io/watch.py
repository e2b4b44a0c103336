"""The collapse watch: signs in a step's metrics that training goes wrong, told with their figures."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epo_kernels.train.config import WatchConfig
from epo_kernels.train.io.failures import RunError

NGRAM = 3


@dataclass(frozen=True)
class Alarm:
    """One sign, from the step at which it had shown for `watch.patience` steps in a row."""

    step: int
    sign: str
    text: str


class CollapsedError(RunError):
    """A warning came and watch.stop was set."""


class CollapseWatch:
    """Counts for how many steps in a row each sign shows; warns when that reaches `patience`, once for each spell."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._spells: Counter[str] = Counter()

    def observe(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Take in a step's metrics, as metrics.jsonl holds them; returns what is new to warn of."""
        signs = self._signs(metrics)
        self._spells = Counter({sign: self._spells[sign] + 1 for sign in signs})
        return [
            Alarm(step, sign, f"{text}, {self._config.patience} steps in a row")
            for sign, text in signs.items()
            if self._spells[sign] == self._config.patience
        ]

    def _signs(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """What shows in these metrics, by name; a figure that was not measured shows nothing."""
        config = self._config
        entropy, groups = metrics.get("actor/entropy"), metrics.get("episode/groups")
        uniform = metrics["episode/groups_without_variance"] / groups if groups else None
        repeated, valid = metrics.get("response/repeated_token_share"), metrics.get("episode/valid_action_ratio")
        found = {}
        if entropy is not None and entropy < config.entropy_low:
            found["entropy_low"] = (
                f"entropy {entropy:.4f} nats a token is below {config.entropy_low:g} (watch.entropy_low): the policy "
                "hardly explores; raise loss.entropy_coeff or loss.band_low, or lower optim.lr"
            )
        if entropy is not None and entropy > config.entropy_high:
            found["entropy_high"] = (
                f"entropy {entropy:.2f} nats a token is above {config.entropy_high:g} (watch.entropy_high): the policy "
                "writes noise; lower loss.entropy_coeff, or let the band restore it (loss.penalty=hinge, alpha > 1)"
            )
        if uniform is not None and uniform >= config.uniform_groups:
            found["uniform_groups"] = (
                f"{uniform:.0%} of groups have equal returns (watch.uniform_groups {config.uniform_groups:.0%}): "
                "nothing to learn from; take easier or harder tasks, a larger algorithm.group_size or a higher "
                "rollout.temperature"
            )
        if repeated is not None and repeated >= config.repeated_tokens:
            found["repeated_tokens"] = (
                f"{repeated:.0%} of response tokens repeat earlier ones (watch.repeated_tokens "
                f"{config.repeated_tokens:.0%}): the policy loops; lower optim.lr or set loss.kl_coeff"
            )
        if valid is not None and valid < config.valid_actions:
            cut = metrics.get("response_length/clip_ratio") or 0.0
            found["valid_actions"] = (
                f"the environment understood {valid:.1%} of actions, below {config.valid_actions:.0%} "
                f"(watch.valid_actions), and {cut:.0%} of responses were cut at rollout.max_response_tokens: read them "
                "in episodes/, and see rollout.response_format, rollout.max_response_tokens and model.warm_start"
            )
        return found


def repeated_share(responses: Sequence[Sequence[int]]) -> float:
    """Share of tokens that end a run of three tokens which the same response held before. Loops of any period count."""
    repeated = total = 0
    for ids in responses:
        total += len(ids)
        seen: set[tuple[int, ...]] = set()
        for end in range(NGRAM, len(ids) + 1):
            run = tuple(ids[end - NGRAM : end])
            repeated += run in seen
            seen.add(run)
    return repeated / total if total else 0.0


def watched(lines: Sequence[Mapping[str, Any]], config: WatchConfig) -> tuple[CollapseWatch, list[Alarm]]:
    """A watch that has seen the lines of metrics.jsonl, and what it warned of."""
    watch = CollapseWatch(config)
    return watch, [warning for line in lines for warning in watch.observe(line["training/global_step"], line)]
