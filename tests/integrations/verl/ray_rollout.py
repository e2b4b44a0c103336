"""A rollout of verl without a GPU: transformers samples, in a server of its own beside each trainer's worker.

`actor_rollout_ref.rollout.name=transformers` selects it where VERL_USE_EXTERNAL_MODULES names this module. Two entries
bring it in: verl's `RolloutReplicaRegistry` has the servers, and verl's table of rollout classes, for which there is no
registry, the side that sends the weights.
"""

from __future__ import annotations

import os

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from transformers import AutoConfig, AutoModelForCausalLM
from verl.workers.rollout import base
from verl.workers.rollout.replica import RolloutReplica, RolloutReplicaRegistry, TokenOutput

NAME = "transformers"
TOKENS_PER_TURN = 8


class Server:
    """An inference engine as verl's client and trainer talk to one: token ids in, sampled token ids out."""

    def __init__(self, model_path: str, rank: int):
        config = AutoConfig.from_pretrained(model_path)
        self._model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        self._rank, self._step = rank, None

    def load(self, weights: dict[str, torch.Tensor], step: int) -> None:
        self._model.load_state_dict(weights, strict=True)
        self._step = step
        torch.manual_seed(100 * step + self._rank)

    @torch.no_grad()
    def generate(self, request_id, prompt_ids, sampling_params, image_data=None, video_data=None) -> TokenOutput:
        prompt = torch.tensor([prompt_ids])
        out = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=sampling_params["temperature"],
            top_k=0,
            max_new_tokens=TOKENS_PER_TURN,
            output_scores=True,
            return_dict_in_generate=True,
        )
        tokens = out.sequences[0, len(prompt_ids) :]
        log_probs = torch.cat(out.scores).log_softmax(-1)[torch.arange(len(tokens)), tokens]
        return TokenOutput(
            token_ids=tokens.tolist(),
            log_probs=log_probs.tolist(),
            stop_reason="completed",
            extra_fields={"global_steps": self._step},
        )

    def sleep(self) -> None:
        """Nothing to free: the CPU's memory holds trainer and rollout."""


class Replica(RolloutReplica):
    """One server, on the node of the worker that trains beside it."""

    async def launch_servers(self):
        node = await self.workers[0].__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())
        server = ray.remote(Server).options(
            name=server_name(self.replica_rank), scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        )
        self._server_handle = server.remote(self.model_config.path, self.replica_rank)
        self._server_address = server_name(self.replica_rank)
        self.servers = [self._server_handle]


class WeightSender(base.BaseRollout):
    """The rollout inside verl's actor worker: after each update it sends the weights to the worker's own server."""

    async def resume(self, tags):
        pass

    async def release(self):
        pass

    async def update_weights(self, weights, wire_format="named_tensors", global_steps=None, **_):
        gathered = dict(weights)  # by all ranks together
        server = ray.get_actor(server_name(int(os.environ["RANK"])))
        await server.load.remote(gathered, global_steps)


def server_name(rank: int) -> str:
    return f"{NAME}_server_{rank}"


RolloutReplicaRegistry.register(NAME, lambda: Replica)
base._ROLLOUT_REGISTRY[NAME, "async"] = f"{__name__}.WeightSender"
