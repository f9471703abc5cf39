"""A device that is not the CPU on a machine that has none: `fake_device.cpp`, made what accelerate, transformers and
TRL take for a GPU. Once in a process, before its first trainer."""

import os
import shutil
import types
from pathlib import Path

import torch
from torch.utils import cpp_extension


NAME = "fake"


def missing() -> str | None:
    """What is needed to build the device and is not there, in words."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        return "there is no C++ compiler"
    if not cpp_extension.is_ninja_available():
        return "ninja is not installed"
    return None


class Generator:
    """The device's random numbers are not the CPU's: its operators draw them from a state of its own."""

    def __init__(self):
        self.state = torch.Generator().manual_seed(1).get_state()

    def run(self, function, *args, **kwargs):
        """Call an operator that draws."""
        of_cpu = torch.get_rng_state()
        torch.set_rng_state(self.state)
        try:
            return function(*args, **kwargs)
        finally:
            self.state = torch.get_rng_state()
            torch.set_rng_state(of_cpu)


GENERATOR = Generator()


def _device_module() -> types.ModuleType:
    def seed(value: int) -> None:
        GENERATOR.state = torch.Generator().manual_seed(value).get_state()

    def set_state(state: torch.Tensor, device=None) -> None:
        GENERATOR.state = state.clone()

    module = types.ModuleType(f"torch.{NAME}")
    functions = {
        "manual_seed": seed,
        "manual_seed_all": seed,
        "get_rng_state": lambda device=None: GENERATOR.state.clone(),
        "set_rng_state": set_state,
        "get_rng_state_all": lambda: [GENERATOR.state.clone()],
        "set_rng_state_all": lambda states: set_state(states[0]),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        **dict.fromkeys(("_lazy_init", "synchronize", "empty_cache", "set_device"), lambda *args: None),
    }
    vars(module).update(functions)
    return module


def install() -> None:
    """Build the device, for half a minute where that was not done before, and use it."""
    os.environ["ACCELERATE_TORCH_DEVICE"] = f"{NAME}:0"
    source = Path(__file__).with_name("fake_device.cpp")
    cpp_extension.load(
        "trl_rdro_fake_device", [str(source)], extra_cflags=["-O0", "-g0"], is_python_module=False, verbose=False
    )
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _device_module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    import transformers.training_args
    import trl.trainer.utils

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    trl.trainer.utils._use_triton = lambda device: True  # as on CUDA, only positions with a label are scored
