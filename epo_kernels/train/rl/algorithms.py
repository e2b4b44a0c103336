"""From the rewards of episodes to the advantage of each token: GRPO, RLOO, GiGPO, and PPO's GAE.

Each algorithm uses `Credit`: the rewards of every turn, and its penalties (invalid actions, and the KL if it is part of
the reward). All compute one advantage per turn, except token-level PPO, which computes one per token.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from epo_kernels.config import KLType
from epo_kernels.reference import kl_penalty
from epo_kernels.train.config import AlgorithmConfig
from epo_kernels.train.data import ENVIRONMENT, Episode, Sample
from epo_kernels.train.io.failures import RunError
from epo_kernels.train.rl.advantages import (
    explained_variance,
    gae,
    groups_without_spread,
    grpo_advantages,
    returns_to_go,
    rloo_advantages,
    whiten,
)
from epo_kernels.train.rl.shaping import shape_samples


@dataclass
class Credit:
    """Rewards and penalties of the turns of one episode, each (T,) float64."""

    group: int
    earned: Tensor  # the environment's rewards
    charged: Tensor  # penalties, positive numbers
    kl: Tensor  # the part of charged that is the KL of the turn's tokens
    states: list[str]  # the state before each turn

    @property
    def net(self) -> Tensor:
        return self.earned - self.charged


def assign_advantages(
    episodes: Sequence[Episode], samples: Sequence[Sample], config: AlgorithmConfig, kl_type: str
) -> dict[str, float]:
    """Set each sample's `advantages`, and with PPO its `returns`. Returns metrics of them.

    algorithm.shape is applied last: the logged advantages are the shaped ones, as used by the loss.

    Args:
        episodes: played; `Sample.episode` indexes them.
        samples: with old_log_probs; with entropy if advantages are shaped; with ref_log_probs unless kl_reward_coeff is
            0; with values for PPO.
        kl_type: estimator of the KL in the reward: k1, k2, k3 or abs.
    """
    token_kl = _token_kl(samples, config.kl_reward_coeff, kl_type)
    credits = _credits(episodes, samples, config.invalid_action_penalty, token_kl)
    groups = torch.tensor([episode.group for episode in episodes])
    if config.name == "ppo":
        metrics = _assign_gae(credits, samples, config, token_kl)
    else:
        spread_over_tokens(samples, _TURN_ADVANTAGES[config.name](credits, config))
        metrics = {}
    if config.name != "ppo" or config.group_size > 1:  # a group of one never has a spread, and a critic needs none
        without_spread = groups_without_spread(_returns(episodes), groups)
        metrics["episode/groups_without_variance"] = len(without_spread)
    shape_samples(episodes, samples, config)
    sampled = torch.cat([_of(sample.advantages)[sample.mask] for sample in samples])
    if config.kl_reward_coeff:
        metrics["actor/reward_kl_penalty"] = float(torch.cat(token_kl).sum()) / config.kl_reward_coeff / len(sampled)
    return {
        **metrics,
        "critic/advantages/mean": float(sampled.mean()),
        "critic/advantages/max": float(sampled.max()),
        "critic/advantages/min": float(sampled.min()),
        "episode/groups": len(groups.unique()),
    }


def drop_groups_without_spread(episodes: Sequence[Episode]) -> list[Episode]:
    """DAPO's dynamic sampling (arXiv 2503.14476): drops groups whose episodes all have the same return."""
    if not episodes:
        return []
    dropped = groups_without_spread(_returns(episodes), torch.tensor([episode.group for episode in episodes]))
    return [episode for episode in episodes if episode.group not in dropped]


def leave_out_truncated(samples: Sequence[Sample], max_response_tokens: int) -> list[Sample]:
    """Masks truncated responses (DAPO's overlong filtering), and drops samples with nothing left.

    A response that uses all of `max_response_tokens` counts as truncated.

    Raises:
        RunError: nothing is left.
    """
    for sample in samples:
        cut = {turn for turn, count in Counter(sample.turns).items() if count >= max_response_tokens}
        sample.turns = [ENVIRONMENT if turn in cut else turn for turn in sample.turns]
    left = [sample for sample in samples if sample.num_sampled]
    if not left:
        raise RunError(
            f"every response reaches rollout.max_response_tokens={max_response_tokens}, and algorithm.mask_truncated "
            "excludes those: nothing is left to learn from; raise the limit, or set mask_truncated=false"
        )
    return left


def first_tokens(turns: Sequence[int]) -> Tensor:
    """(R,) bool: the first token of each turn, whose state is the turn's state."""
    before = [ENVIRONMENT, *turns[:-1]]
    return torch.tensor([turn not in (ENVIRONMENT, last) for turn, last in zip(turns, before, strict=True)])


def value_states(sample: Sample, level: str) -> Tensor:
    """(R,) bool: the tokens before which the critic estimates a value, by algorithm.gae."""
    return first_tokens(sample.turns) if level == "turn" else sample.mask


def spread_over_tokens(samples: Sequence[Sample], advantages: Sequence[Tensor]) -> None:
    """Set each sample's advantages from the advantages of its turns, (T,) per episode."""
    for sample in samples:
        own = torch.cat([advantages[sample.episode].float(), torch.zeros(1)])  # index -1 (ENVIRONMENT) is the last
        sample.advantages = own[torch.tensor(sample.turns)]


def _compared(
    credits: Sequence[Credit], config: AlgorithmConfig, compare: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """One advantage per turn, by comparing episodes, or turns as in the published code."""
    if config.group_over == "episodes":
        returns = torch.stack([credit.net.sum() for credit in credits])
        values = compare(returns, torch.tensor([credit.group for credit in credits]))
        return [value.expand(len(credit.net)) for value, credit in zip(values, credits, strict=True)]
    returns = torch.cat([credit.earned.sum() - credit.charged for credit in credits])
    groups = torch.cat([torch.full((len(credit.net),), credit.group) for credit in credits])
    return list(compare(returns, groups).split([len(credit.net) for credit in credits]))


def _grpo(credits: Sequence[Credit], config: AlgorithmConfig) -> list[Tensor]:
    return _compared(credits, config, lambda r, g: grpo_advantages(r, g, config.normalize_std))


def _rloo(credits: Sequence[Credit], config: AlgorithmConfig) -> list[Tensor]:
    return _compared(credits, config, rloo_advantages)


def _gigpo(credits: Sequence[Credit], config: AlgorithmConfig) -> list[Tensor]:
    """Group-in-group (arXiv 2505.10978): the episode's advantage plus the turn's advantage within its anchor group.

    An anchor group contains all turns of a group's episodes taken in the same state; their discounted returns from
    there on are compared. A state seen only once adds 0.

    The paper's anchor is the environment's state, which its code derives from the observation's text. Here too it is
    the environment's own state, never the prompt with its history. ScienceWorld: look-around and inventory in their
    fixed order. ALFWorld: the last answer to a move, and the inventory ("Nothing happens." and looking at things change
    no state; the list of commands is not included, so `admissible_commands` changes no anchor). practice: the scene.
    """
    anchors: dict[tuple[int, str], int] = {}
    keys = [anchors.setdefault((c.group, state), len(anchors)) for c in credits for state in c.states]
    following = torch.cat([returns_to_go(credit.net, config.gamma) for credit in credits])
    steps = grpo_advantages(following, torch.tensor(keys), config.normalize_std)
    of_turns = steps.split([len(credit.net) for credit in credits])
    episodes = _grpo(credits, config)
    return [whole + config.step_weight * step for whole, step in zip(episodes, of_turns, strict=True)]


_TURN_ADVANTAGES = {"grpo": _grpo, "rloo": _rloo, "gigpo": _gigpo}


def _assign_gae(
    credits: Sequence[Credit], samples: Sequence[Sample], config: AlgorithmConfig, token_kl: Sequence[Tensor]
) -> dict[str, float]:
    """PPO: sets advantages and returns of the samples, by the level of algorithm.gae.

    "turn": one action per turn, with the state before its first token. "token": one action per token, through all turns
    of the episode; a turn's reward comes with its last token. "published": each turn separately, by tokens, with the
    whole return on its last token.
    """
    for number, credit in enumerate(credits):
        own = [(sample, kl) for sample, kl in zip(samples, token_kl, strict=True) if sample.episode == number]
        turns = torch.cat([torch.tensor(sample.turns)[sample.mask] for sample, _ in own])
        values = torch.cat([_of(sample.values)[sample.mask] for sample, _ in own])
        kl = torch.cat([kl[sample.mask] for sample, kl in own])
        advantages, returns = _gae_of(credit, turns, values, kl, config)
        counts = [sample.num_sampled for sample, _ in own]
        for (sample, _), advantage, target in zip(own, advantages.split(counts), returns.split(counts), strict=True):
            sample.advantages = torch.zeros(len(sample.turns)).masked_scatter(sample.mask, advantage.float())
            sample.returns = torch.zeros(len(sample.turns)).masked_scatter(sample.mask, target.float())
    states = [value_states(sample, config.gae) for sample in samples]
    values = torch.cat([_of(sample.values)[state] for sample, state in zip(samples, states, strict=True)])
    returns = torch.cat([_of(sample.returns)[state] for sample, state in zip(samples, states, strict=True)])
    if config.whiten:
        _whiten(samples)
    return {
        "critic/values/mean": float(values.mean()),
        "critic/values/max": float(values.max()),
        "critic/values/min": float(values.min()),
        "critic/returns/mean": float(returns.mean()),
        "critic/vf_explained_var": explained_variance(values, returns),
    }


def _gae_of(
    credit: Credit, turns: Tensor, values: Tensor, kl: Tensor, config: AlgorithmConfig
) -> tuple[Tensor, Tensor]:
    """Advantages and returns of an episode's tokens, each (N,), from their turns, values and KL, all (N,)."""
    starts = torch.cat([torch.ones(1, dtype=torch.bool), turns[1:] != turns[:-1]])
    if config.gae == "turn":
        advantages, returns = gae(credit.net, values[starts], config.gamma, config.lam)
        return advantages[turns], returns[turns]
    ends = starts.roll(-1)
    rewards = -kl
    charged = credit.charged - credit.kl  # the KL is charged token by token
    if config.gae == "token":
        rewards[ends] += (credit.earned - charged)[turns[ends]]
        return gae(rewards, values, config.gamma, config.lam)
    rewards[ends] += credit.earned.sum() - charged[turns[ends]]
    lengths = torch.bincount(turns).tolist()
    parts = [
        gae(reward, value, config.gamma, config.lam)
        for reward, value in zip(rewards.split(lengths), values.split(lengths), strict=True)
    ]
    return torch.cat([advantage for advantage, _ in parts]), torch.cat([target for _, target in parts])


def _whiten(samples: Sequence[Sample]) -> None:
    white = whiten(torch.cat([_of(sample.advantages)[sample.mask] for sample in samples]))
    for sample, own in zip(samples, white.split([sample.num_sampled for sample in samples]), strict=True):
        sample.advantages = torch.zeros(len(sample.turns)).masked_scatter(sample.mask, own)


def _credits(
    episodes: Sequence[Episode], samples: Sequence[Sample], penalty: float, token_kl: Sequence[Tensor]
) -> list[Credit]:
    credits = []
    for episode in episodes:
        earned = torch.tensor([turn.reward for turn in episode.turns], dtype=torch.float64)
        charged = torch.tensor([0.0 if turn.valid else penalty for turn in episode.turns], dtype=torch.float64)
        seen = [turn.observation for turn in episode.turns]
        states = [observation.state or observation.scene or observation.text for observation in seen]
        credits.append(Credit(episode.group, earned, charged, torch.zeros_like(earned), states))
    for sample, kl in zip(samples, token_kl, strict=True):
        own = credits[sample.episode]
        own.kl.index_add_(0, torch.tensor(sample.turns)[sample.mask], kl[sample.mask])
    for credit in credits:
        credit.charged = credit.charged + credit.kl
    return credits


def _token_kl(samples: Sequence[Sample], coeff: float, kl_type: str) -> list[Tensor]:
    """The KL penalty of each token, (R,) float64."""
    if not coeff:
        return [torch.zeros(len(sample.turns), dtype=torch.float64) for sample in samples]
    return [
        coeff * kl_penalty(_of(s.old_log_probs).double(), _of(s.ref_log_probs).double(), cast(KLType, kl_type)) * s.mask
        for s in samples
    ]


def _returns(episodes: Sequence[Episode]) -> Tensor:
    return torch.tensor([episode.total_reward for episode in episodes], dtype=torch.float64)


def _of(values: Tensor | None) -> Tensor:
    if values is None:
        raise ValueError("samples must be scored, by the critic too with PPO, before advantages are assigned")
    return values
