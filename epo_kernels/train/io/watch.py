"""The collapse watch: detects signs of failing training in a step's metrics."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epo_kernels.train.config import WatchConfig
from epo_kernels.train.io.failures import RunError

NGRAM = 3


@dataclass(frozen=True)
class Alarm:
    """A sign, at the step at which it has been present for `watch.patience` consecutive steps."""

    step: int
    sign: str
    text: str


class CollapsedError(RunError):
    """A collapse warning was raised and watch.stop is set."""


class CollapseWatch:
    """Counts consecutive steps with each sign; warns when the count reaches `patience`, once per streak."""

    def __init__(self, config: WatchConfig) -> None:
        self._config = config
        self._spells: Counter[str] = Counter()

    def observe(self, step: int, metrics: Mapping[str, Any]) -> list[Alarm]:
        """Process a step's metrics, as in metrics.jsonl; returns new warnings."""
        signs = self._signs(metrics)
        self._spells = Counter({sign: self._spells[sign] + 1 for sign in signs})
        return [
            Alarm(step, sign, f"{text}, {self._config.patience} steps in a row")
            for sign, text in signs.items()
            if self._spells[sign] == self._config.patience
        ]

    def _signs(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """The signs present in these metrics, by name; metrics that were not measured show none."""
        config = self._config
        entropy, groups = metrics.get("actor/entropy"), metrics.get("episode/groups")
        without_spread = metrics.get("episode/groups_without_variance")  # PPO with groups of one measures none
        uniform = without_spread / groups if groups and without_spread is not None else None
        repeated, valid = metrics.get("response/repeated_token_share"), metrics.get("episode/valid_action_ratio")
        found = {}
        if entropy is not None and entropy < config.entropy_low:
            found["entropy_low"] = (
                f"entropy {entropy:.4f} nats per token is below {config.entropy_low:g} (watch.entropy_low): too little "
                "exploration; lower optim.lr, or raise loss.entropy_coeff or loss.band_low"
            )
        if entropy is not None and entropy > config.entropy_high:
            found["entropy_high"] = (
                f"entropy {entropy:.2f} nats per token is above {config.entropy_high:g} (watch.entropy_high): the "
                "policy generates noise; lower loss.entropy_coeff, or use a restoring band (penalty=hinge, alpha > 1)"
            )
        if uniform is not None and uniform >= config.uniform_groups:
            found["uniform_groups"] = (
                f"{uniform:.0%} of groups have equal returns (watch.uniform_groups {config.uniform_groups:.0%}): "
                "no learning signal; choose easier or harder tasks, a larger algorithm.group_size or a higher "
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
                f"(watch.valid_actions), and {cut:.0%} of responses were truncated at rollout.max_response_tokens: "
                "read episodes/, and check rollout.response_format, rollout.max_response_tokens and model.warm_start"
            )
        return found


def repeated_share(responses: Sequence[Sequence[int]]) -> float:
    """Share of tokens that complete a trigram seen earlier in the same response. Detects loops of any period."""
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
    """A watch that has processed the lines of metrics.jsonl, and its warnings."""
    watch = CollapseWatch(config)
    return watch, [warning for line in lines for warning in watch.observe(line["training/global_step"], line)]
