"""Run by torchrun, as two processes, from test_distributed.py: runs, then inspections of the parts. Writes JSON."""

import copy
import json
import shutil
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen3MoeConfig

from epo_kernels.train.__main__ import _parse, _run, leave
from epo_kernels.train.config import ConfigError, ModelConfig
from epo_kernels.train.data import Draw, Episode
from epo_kernels.train.distributed import Ranks, launched
from epo_kernels.train.envs import EnvironmentFailure, Task
from epo_kernels.train.io.failures import PromptTooLong
from epo_kernels.train.io.stopping import Stopped, StopRequest
from epo_kernels.train.models.loading import load_causal_lm
from epo_kernels.train.models.policy import build_from_scratch
from epo_kernels.train.rl.post_mortem import nonfinite_weights
from epo_kernels.train.rollout.shared import SharedRollout


class Failing:
    """A rollout that finishes its episodes, but for the second rank's, where the exception is raised."""

    def __init__(self, ranks: Ranks, failure: Exception | None, earlier: Exception | None) -> None:
        self.failure, self.earlier = (None, None) if ranks.is_first else (failure, earlier)
        self.rank = ranks.rank

    def prefetch(self, episodes):
        if self.earlier:
            raise self.earlier

    def play(self, episodes, report):
        for episode in episodes:
            episode.score = 10.0 * self.rank + episode.seed[-1]
        if self.failure:
            raise self.failure


def loaded_from(run: Path) -> list[str]:
    """Settings of a step that begins with another run's first policy, with products in bfloat16."""
    source = run / "checkpoints" / "global_step_0" / "actor"
    model = [f"model.name_or_path={source}", "model.warm_start.demonstrations=0", "model.dtype=bfloat16"]
    return [*model, "steps=1", "evaluate.panels=[]"]


def played_together(ranks: Ranks, failure: Exception | None, earlier: Exception | None = None):
    """What happens if the second rank fails while playing, or earlier, while prefetching."""
    episodes = [Episode(Task("t", 0), 0, (0, Draw.EPISODE, 0, i)) for i in range(5)]
    rollout = SharedRollout(Failing(ranks, failure, earlier), ranks, None)
    rollout.prefetch(episodes)
    try:
        rollout.play(episodes)
    except (Stopped, EnvironmentFailure, RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return [episode.score for episode in episodes]


class Asked(StopRequest):
    """A request that only the second rank got."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._received = None if ranks.is_first else 15


def asked_to_stop(ranks: Ranks) -> str:
    try:
        ranks.check(Asked(ranks))
    except Stopped as stopped:
        return str(stopped)
    return "went on"


def refused_on_the_first(ranks: Ranks) -> str:
    def refuse() -> None:
        raise ConfigError(f"in use, says rank {ranks.rank}")

    try:
        ranks.on_first(refuse)
    except ConfigError as error:
        return str(error)
    return "went on"


def sharded(ranks: Ranks) -> dict[str, object]:
    model = build_from_scratch([], ModelConfig(), seed=0).model
    plain = copy.deepcopy(model)
    ranks.shard(model.get_decoder(), model.device)
    split = [p for p in model.parameters() if isinstance(p, DTensor)]
    ids = torch.arange(6)[None]
    with ranks.whole(model):  # another number of forward passes on every rank: none of them may wait for another
        logits = [model(ids).logits for _ in range(1 + 2 * ranks.rank)]
    return {
        "split": len(split),
        "all": len(list(model.parameters())),
        "local_share": sum(p.to_local().numel() for p in split) / sum(p.numel() for p in split),
        "same": all(torch.allclose(own, plain(ids).logits, atol=1e-5) for own in logits),
        "split_again": all(isinstance(p, DTensor) for p in model.model.layers.parameters()),
    }


SHAPE = {"vocab_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SOURCES = {
    "tied": Qwen2Config(**SHAPE, hidden_size=768, intermediate_size=3072, tie_word_embeddings=True),
    "untied": Qwen2Config(**SHAPE, hidden_size=32, intermediate_size=48, tie_word_embeddings=False),
    # Each expert has tensors of its own in the files, and the model has one for all: five experts, three and two.
    "experts": Qwen3MoeConfig(
        **SHAPE, hidden_size=32, head_dim=8, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24
    ),
}


@contextmanager
def peak_of_memory(found: list[int]):
    """Inside, watches the process's own memory (files that are mapped don't count); then appends its peak in bytes."""

    def used() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    def watch() -> None:
        while not done.wait(0.001):
            seen.append(used())

    start, seen, done = used(), [], threading.Event()
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        done.set()
        watching.join()
        found.append(max(*seen, used()) - start)


def loaded_in_parts(ranks: Ranks, folder: Path) -> dict[str, dict[str, object]]:
    """What each rank has of models that are split before their weights are read, against the whole ones."""
    return {name: _loaded_in_parts(ranks, folder / name, config) for name, config in SOURCES.items()}


def _loaded_in_parts(ranks: Ranks, source: Path, config) -> dict[str, object]:
    if ranks.is_first:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(source, max_shard_size="20MB")
    ranks.wait()
    on_meta, peaks = [], []

    def prepare(model) -> None:
        on_meta.extend(parameter.is_meta for parameter in model.parameters())
        ranks.shard(model.get_decoder(), torch.device("cpu"))

    with peak_of_memory(peaks):
        model = load_causal_lm(str(source), prepare)
    whole = load_causal_lm(str(source))
    layers = list(model.get_decoder().layers.parameters())
    own, expected = model.state_dict(), whole.state_dict()
    ids = torch.arange(6)[None]
    return {
        "built_on_meta": all(on_meta),
        "split": all(isinstance(parameter, DTensor) for parameter in layers),
        "own_bytes": sum(parameter.to_local().nbytes for parameter in layers),
        "all_bytes": sum(parameter.nbytes for parameter in layers),
        "peak": peaks[0],
        "same_type": type(model) is type(whole),
        "same_weights": own.keys() == expected.keys()
        and all(
            torch.equal(value.full_tensor() if isinstance(value, DTensor) else value, expected[name])
            for name, value in own.items()
        ),
        "same_buffers": all(
            torch.equal(one, other) for one, other in zip(model.buffers(), whole.buffers(), strict=True)
        ),
        "tied": model.get_input_embeddings().weight is model.get_output_embeddings().weight,
        "same_logits": torch.allclose(model(ids).logits, whole(ids).logits, atol=1e-5),
    }


def broken_weights(ranks: Ranks) -> list[str]:
    """Of a split model in whose second rank alone a weight is NaN."""
    model = build_from_scratch([], ModelConfig(), seed=0).model
    ranks.shard(model.get_decoder(), model.device)
    if not ranks.is_first:
        nn.init.constant_(model.get_decoder().layers[0].mlp.up_proj.weight.to_local(), float("nan"))
    return nonfinite_weights(model)


def inspect(ranks: Ranks, folder: Path) -> dict[str, object]:
    return {
        "played": played_together(ranks, None),
        "stopped": played_together(ranks, Stopped(15)),
        "lost": played_together(ranks, EnvironmentFailure("it died")),
        "too_long": played_together(ranks, PromptTooLong("raise it")),
        "prefetched": played_together(ranks, None, EnvironmentFailure("it died in a reset")),
        "broken": played_together(ranks, ValueError("bad")),
        "asked": asked_to_stop(ranks),
        "refused": refused_on_the_first(ranks),
        "dealt": list(ranks.deal("abcde")),
        "sharded": sharded(ranks),
        "loaded": loaded_in_parts(ranks, folder),
        "broken_weights": broken_weights(ranks),
    }


if __name__ == "__main__":
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    config, _ = _parse([*arguments, f"run_dir={folder / 'two'}"])
    with launched(config.model.fsdp, config.model.device) as ranks:  # one process group for all
        found = inspect(ranks, folder)  # first, since a run has its process keep freed memory
        codes = [_run(config, dry=False, ranks=ranks)]
        if ranks.is_first:
            shutil.copytree(folder / "two", folder / "resumed")
            shutil.rmtree(folder / "resumed" / "checkpoints" / "global_step_2")
        ranks.wait()
        for run, settings in (("resumed", []), ("two_loaded", loaded_from(folder / "two"))):
            again, _ = _parse([*arguments, *settings, f"run_dir={folder / run}"])
            codes.append(_run(again, dry=False, ranks=ranks))
        (folder / f"rank_{ranks.rank}.json").write_text(json.dumps({"codes": codes, **found}))
    leave(0)
