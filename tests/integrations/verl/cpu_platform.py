"""The CPU as a platform of verl, by verl's own plug-in hook, so that its real engine trains here over gloo.

verl brings platforms for accelerators alone. Taken by VERL_PLATFORM=cpu and VERL_USE_EXTERNAL_MODULES naming this
module; VERL_ENGINE_DEVICE=cuda makes it choose the FSDP engine, which asks the platform for everything else.

One function of verl is replaced, since it has no hook: its process group asks for one backend of the CPU and one of the
accelerator, and torch refuses that where both are the CPU. So name this module before those that import verl's workers.
"""

from __future__ import annotations

import functools
import types
from contextlib import nullcontext

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry
from verl.utils import distributed

_DEVICE = types.ModuleType("cpu_device")  # torch.cpu has no memory statistics
_DEVICE.max_memory_allocated = _DEVICE.max_memory_reserved = lambda: 0  # type: ignore[attr-defined]
_DEVICE.memory_allocated = _DEVICE.memory_reserved = lambda: 0  # type: ignore[attr-defined]
_DEVICE.mem_get_info = lambda: (0, 0)  # type: ignore[attr-defined]
_DEVICE.get_device_name = lambda: "CPU"  # type: ignore[attr-defined]
_DEVICE.get_rng_state, _DEVICE.set_rng_state = torch.get_rng_state, torch.set_rng_state  # type: ignore[attr-defined]
_DEVICE.is_available = lambda: False  # type: ignore[attr-defined]
_DEVICE.synchronize = _DEVICE.empty_cache = lambda: None  # type: ignore[attr-defined]
_DEVICE.current_device = lambda: "cpu"  # type: ignore[attr-defined]

distributed.initialize_global_process_group_ray = functools.partial(
    distributed.initialize_global_process_group_ray, backend="gloo"
)


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _DEVICE

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return None, None

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return nullcontext()

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "GPU"  # verl counts no other resource; Ray takes the number that a node is started with on trust

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None
