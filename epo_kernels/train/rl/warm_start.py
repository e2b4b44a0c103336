"""The warm start: cross-entropy on demonstrated actions, with the prompts of the rollout."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import epo_kernels as ek
from epo_kernels.heads import head_of
from epo_kernels.train.config import ConfigError, WarmStartConfig
from epo_kernels.train.data import Draw, Episode, MiniBatch, Sample, Turn, samples_of
from epo_kernels.train.envs import Demonstration, Suite
from epo_kernels.train.io.progress import Report, ignore
from epo_kernels.train.models.policy import Policy, response_hidden
from epo_kernels.train.rollout.prompts import Prompts


def demonstrate(suite: Suite, count: int, report: Report = ignore) -> list[Demonstration]:
    """Demonstrations of the first `count` training tasks, or of all tasks if there are fewer.

    `report` receives the number played so far; an exception it raises stops the work.

    Raises:
        ConfigError: the environment cannot demonstrate one of the tasks.
    """
    threads = ThreadPoolExecutor(2)
    demonstrations: list[Demonstration] = []
    try:
        for demonstration in threads.map(suite.demonstrate, suite.tasks("train")[:count]):
            demonstrations.append(demonstration)
            report(len(demonstrations))
    except ValueError as error:
        raise ConfigError(f"model.warm_start.demonstrations: {error}") from error
    finally:
        threads.shutdown(cancel_futures=True)
        suite.close()  # its simulators are no longer needed
    return demonstrations


def cloning_samples(
    demonstrations: Sequence[Demonstration],
    policy: Policy,
    prompts: Prompts,
    max_response_tokens: int,
    layout: str = "turn",
) -> list[Sample]:
    """Samples as if the rollout had played the demonstrated actions: prompts, actions and end tokens."""
    episodes = []
    for demonstration in demonstrations:
        responses = policy.chat.text(demonstration.actions)
        past: list[Turn] = []
        for index, (seen, action) in enumerate(zip(demonstration.observations, demonstration.actions, strict=True)):
            (prompt_ids,) = prompts.encode([(seen, past)])
            response_ids = [*responses[index], policy.end_id][:max_response_tokens]
            is_last = index + 1 == len(demonstration.actions)
            result = "" if is_last else demonstration.observations[index + 1].text
            log_probs = [0.0] * len(response_ids)  # not sampled
            past.append(Turn(seen, prompt_ids, response_ids, log_probs, action, valid=True, result=result))
        episodes.append(Episode(demonstration.task, 0, (0, Draw.CLONING, 0, 0), turns=past))
    return samples_of(episodes, layout)


def clone(policy: Policy, samples: list[Sample], config: WarmStartConfig, seed: int, report: Report) -> list[float]:
    """Train the policy on the samples in place; returns the mean loss of each epoch.

    `report` receives the number of epochs done, after every batch.
    """
    means = []
    model, head = policy.model, head_of(policy.model)
    rng = np.random.default_rng([seed, Draw.CLONING])
    batches_an_epoch = -(-len(samples) // config.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.01, fused=True)
    steps = config.epochs * batches_an_epoch + 1
    # With fewer than ten steps a tenth would be zero, and the schedule divides by it.
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=steps, pct_start=max(0.1, 2 / steps)
    )
    for epoch in range(config.epochs):
        losses = []
        for chosen in _alike_batches(samples, config.batch_size, rng):
            batch = MiniBatch.of(chosen, policy.pad_id, model.device)
            log_probs, _ = ek.linear_log_probs_and_entropy(
                response_hidden(model.get_decoder(), batch),
                head.weight,
                batch.tokens,
                **head.keywords,
                mask=batch.mask,
                num_active=batch.num_sampled,
                entropy=False,
            )
            loss = -log_probs.sum() / batch.num_sampled
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            report(epoch + len(losses) / batches_an_epoch)
        means.append(float(torch.stack(losses).mean()))
    return means


def _alike_batches(samples: list[Sample], size: int, rng: np.random.Generator) -> list[list[Sample]]:
    """A shuffled epoch of batches with samples of similar length, to minimise padding."""
    order = sorted(rng.permutation(len(samples)), key=lambda i: samples[i].length // 16)
    batches = [[samples[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
    rng.shuffle(batches)
    return batches
