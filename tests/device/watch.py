"""Every operator of a run on the fake device, backward included, and the line of code that asked for it."""

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torchgen
import yaml
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .fake_device import GENERATOR, NAME


PACKAGE = "/trl_rdro/"
MAKERS = {torch.tensor, torch.as_tensor, torch.Tensor.new_tensor}  # they copy out of a dispatch mode's sight
MOVERS = {"aten::_to_copy", "aten::copy_", "aten::_copy_from", "aten::set_"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
SIZED_BY_VALUES = {
    f"aten::{name}" for name in ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal")
}
# What fails on a GPU; the others cost time there
FAULTS = ("two devices", "no CUDA kernel", "float64")


class Event(NamedTuple):
    kind: str
    operator: str
    file: str  # from the package's or the test's folder on, or "" if no code but PyTorch's stands above it: a backward
    function: str
    line: int

    def __str__(self) -> str:
        return f"{self.kind}, {self.operator}, {self.file}:{self.line} {self.function}"


def without_cuda_kernel() -> set[str]:
    """The operators that PyTorch implements for the CPU only."""
    path = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
    found = set()
    for entry in yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        backends = ",".join(entry.get("dispatch", {}))
        elsewhere = any(name in backends for name in ("CUDA", "Composite")) or "structured_delegate" in entry
        if "CPU" in backends and not elsewhere:
            found.add("aten::" + entry["func"].split("(")[0])
    return found


def _place() -> tuple[str, str, int]:
    """File, function and line of the innermost code that is neither PyTorch's nor of this module."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and "<" not in name and name != __file__:
            folder = next((part for part in (PACKAGE, "/tests/", "/site-packages/") if part in name), "/")
            function = frame.f_code.co_qualname.partition(".<locals>")[0]
            return folder.strip("/") + "/" + name.rpartition(folder)[2], function, frame.f_lineno
        frame = frame.f_back
    return "", "", 0


class Watch(TorchDispatchMode):
    """Counts `Event`s, and lets the device draw from its own generator."""

    def __init__(self):
        super().__init__()
        self.events = Counter[Event]()
        self.cpu_only = without_cuda_kernel()

    def note(self, kind: str, operator: str) -> None:
        self.events[Event(kind, operator, *_place())] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        full = f"{name}.{func._schema.overload_name}".rstrip(".")
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_device = any(x.device.type == NAME for x in given)
        # In arithmetic CUDA takes a number that lies on the CPU, but not in these
        number_fits = name not in ("aten::stack", "aten::cat")
        on_cpu = any(x.device.type == "cpu" and (x.dim() or not number_fits) for x in given)
        if on_device and on_cpu and name not in MOVERS:
            self.note("two devices", full)
        if on_device and full in self.cpu_only:
            self.note("no CUDA kernel", full)
        draws = on_device and torch.Tag.nondeterministic_seeded in func.tags
        out = GENERATOR.run(func, *args, **kwargs) if draws else func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        if any(x.dtype == torch.float64 and x.device.type == NAME for x in made):
            self.note("float64", full)  # MPS has none
        if kind := _wait(name, args, kwargs, given, made):
            self.note(kind, full)
        return out


def _wait(name: str, args: tuple, kwargs: dict, given: list, made: list) -> str | None:
    """For what the host waits with this operator, if it waits."""
    from_device = any(x.device.type == NAME for x in given)
    if name == "aten::copy_":
        devices = {x.device.type for x in given}
        return None if len(devices) == 1 else "copy from host" if args[0].device.type == NAME else "copy to host"
    if name == "aten::_to_copy" and not kwargs.get("non_blocking"):
        to_device = made[0].device.type == NAME
        return None if to_device == from_device else "copy from host" if to_device else "copy to host"
    if not from_device:
        return None
    if name == "aten::_local_scalar_dense":
        return "value read"
    if name in SIZED_BY_VALUES:
        return "size by values"
    if name in INDEXING and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]):
        return "boolean index"
    return None


class _WatchMakers(TorchFunctionMode):
    def __init__(self, watch: Watch):
        super().__init__()
        self.watch = watch

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in MAKERS and out.device.type == NAME:
            data = args[1 if func is torch.Tensor.new_tensor else 0]
            if not isinstance(data, torch.Tensor) or data.device.type != NAME:
                self.watch.note("copy from host", func.__name__)
        return out


@contextlib.contextmanager
def watched() -> Iterator[Watch]:
    watch = Watch()
    with _WatchMakers(watch), watch:
        yield watch


def faults(events: Counter[Event]) -> list[str]:
    """What would fail on a GPU. float64 only where it is ours: TRL's and the optimiser's is theirs to judge."""
    return [str(e) for e in events if e.kind in FAULTS and (e.kind != "float64" or e.file.startswith("trl_rdro/"))]


def waits(events: Counter[Event]) -> Counter[str]:
    """How often the host waits for the device or copies to it, by our functions."""
    found = Counter[str]()
    for event, times in events.items():
        if event.kind not in FAULTS and event.file.startswith("trl_rdro/"):
            found[event.function] += times
    return found
