"""
Whether a checkpoint is complete: every file that resuming needs is there, readable, and as it was written.

Nothing is read through, since a large model's checkpoint is hundreds of gigabytes: an archive must have its directory
of contents (which is at its end), a safetensors file the length that its header says, and where a manifest was written
every file its size and the checksum of its first and last megabytes. Small files are so checked to the last bit. What
is not found is a bit that flipped in the middle of a large file.
"""

import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .files import read_json, write_json


STATE = "trainer_state.json"  # written last
MANIFEST = "manifest.json"
CHECKED_BYTES = 4 << 20  # at each end of a file

WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")
# What the trainer reads when it resumes; the rest of a checkpoint is for loading the model elsewhere
RESUMING = re.compile(r".*\.(safetensors|pt|pth|bin|distcp|index\.json)|\.metadata|latest|adapter_config\.json")


class Fault(Exception):
    """What keeps a checkpoint from being resumed, in a few words."""


def fault(checkpoint: str | Path) -> str | None:
    """What keeps a checkpoint from being resumed, in a few words, or None. Never raises."""
    try:
        _require_state(Path(checkpoint))
        for path in _needed(Path(checkpoint)):
            _require_readable(path)
        _require_as_written(Path(checkpoint))
    except Fault as found:
        return str(found)
    except Exception as error:  # there is no end to what damage does to a parser
        return f"it cannot be read ({type(error).__name__}: {error})"
    return None


def is_complete(checkpoint: str | Path) -> bool:
    return fault(checkpoint) is None


def has_state(checkpoint: str | Path) -> bool:
    """Whether a checkpoint was written to its end; other files of it may be missing since."""
    try:
        _require_state(Path(checkpoint))
    except (Fault, OSError):
        return False
    return True


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoints below `output_dir`, complete or not, the newest first."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of, reverse=True)


def step_of(checkpoint: str | Path) -> int:
    """The step in the name of a checkpoint."""
    return int(Path(checkpoint).name.removeprefix("checkpoint-"))


def last_complete_checkpoint(
    output_dir: str | Path, warn: Callable[[str], Any] = lambda sentence: None, before: float = math.inf
) -> str | None:
    """The newest complete checkpoint below `output_dir` of an earlier step than `before`, if there is one. `warn` is
    told which are passed over."""
    for checkpoint in checkpoints(output_dir):
        if step_of(checkpoint) >= before:
            continue
        if (found := fault(checkpoint)) is None:
            return str(checkpoint)
        warn(f"{checkpoint} is not complete and is passed over: {found}.")
    return None


def how_to_go_on(output_dir: str | Path) -> str:
    """What to do after a run in `output_dir` was stopped."""
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is None:
        return "there is no complete checkpoint yet, the same command starts from the beginning"
    return f"the same command with `resume_from_checkpoint: true` goes on from {checkpoint}"


# What must be there


def _require_state(checkpoint: Path) -> None:
    path = checkpoint / STATE
    if not path.is_file():
        raise Fault(f"it was not written to its end, {STATE} is missing")
    try:
        state = read_json(path)
    except ValueError:
        raise Fault(f"{STATE} is damaged") from None
    if not isinstance(state, dict) or type(state.get("global_step")) is not int:
        raise Fault(f"{STATE} is damaged")


def _needed(checkpoint: Path) -> Iterator[Path]:
    """The files that resuming needs, in whatever layout this checkpoint was written."""
    if (checkpoint / "latest").is_file():
        yield from _deepspeed_states(checkpoint)
    else:
        yield from _weights(checkpoint)
        yield from _one_of(checkpoint, "the state of the optimiser", OPTIMIZERS, "optimizer_*/.metadata")
        yield checkpoint / "scheduler.pt"
    yield from _random_states(checkpoint)


def _one_of(checkpoint: Path, what: str, names: tuple[str, ...], *patterns: str) -> Iterator[Path]:
    found = [checkpoint / name for name in names if (checkpoint / name).exists()]
    found += [path for pattern in patterns for path in checkpoint.glob(pattern)]
    if not found:
        raise Fault(f"{what} ({names[0]}) is missing")
    yield from found


def _weights(checkpoint: Path) -> Iterator[Path]:
    others = ("*/adapter_model.safetensors", "pytorch_model_fsdp.bin", "pytorch_model_fsdp_*/.metadata")
    for path in _one_of(checkpoint, "the weights", (*WEIGHTS, *INDICES), *others):
        yield path
        if path.name in INDICES:
            yield from (checkpoint / shard for shard in sorted(set(read_json(path)["weight_map"].values())))
        elif path.name.startswith("adapter_model"):
            yield path.with_name("adapter_config.json")


def _deepspeed_states(checkpoint: Path) -> Iterator[Path]:
    tag = (checkpoint / "latest").read_text().strip()
    models = list(checkpoint.glob(f"{tag}/*model_states.pt"))
    if not models:
        raise Fault(f"DeepSpeed's model states ({tag}/) are missing")
    optimizers = list(checkpoint.glob(f"{tag}/*optim_states.pt"))
    ranks = {int(match[1]) for path in optimizers if (match := re.search(r"zero_pp_rank_(\d+)", path.name))}
    _require_all(ranks, f"{tag}/*zero_pp_rank_{{}}*optim_states.pt")
    yield from models + optimizers


def _random_states(checkpoint: Path) -> Iterator[Path]:
    paths = list(checkpoint.glob("rng_state*.pth"))
    if not paths:
        raise Fault("the state of the random numbers (rng_state.pth) is missing")
    ranks = {int(match[1]) for path in paths if (match := re.fullmatch(r"rng_state_(\d+)\.pth", path.name))}
    _require_all(ranks, "rng_state_{}.pth")
    yield from paths


def _require_all(ranks: set[int], name: str) -> None:
    """Ranks count from 0."""
    for rank in range(max(ranks, default=-1)):
        if rank not in ranks:
            raise Fault(f"{name.format(rank)} is missing")


def _require_readable(path: Path) -> None:
    if not path.is_file():
        raise Fault(f"{path.name} is missing")
    if path.suffix == ".safetensors":
        readable = _is_whole_safetensors(path)
    elif path.suffix in (".pt", ".pth", ".bin"):
        readable = _is_whole_archive(path)
    elif path.suffix == ".json":
        readable = isinstance(read_json(path), dict)
    else:
        readable = path.stat().st_size > 0
    if not readable:
        raise Fault(f"{path.name} is damaged")


def _is_whole_safetensors(path: Path) -> bool:
    """A header of known length, then the data to the largest offset in it."""
    with open(path, "rb") as file:
        start = file.read(8)
        if len(start) < 8:
            return False
        (length,) = struct.unpack("<Q", start)
        size = path.stat().st_size
        if not 0 < length <= size - 8:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0) == size


def _is_whole_archive(path: Path) -> bool:
    """What `torch.save` writes is a zip archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("data.pkl") for name in archive.namelist())
    except zipfile.BadZipFile:
        return False


# As it was written


def write_manifest(checkpoint: str | Path) -> None:
    """Write down what is in a checkpoint, after all processes have written and before `trainer_state.json` is."""
    paths = [path for path in Path(checkpoint).rglob("*") if path.is_file() and _serves_resuming(path)]
    entries = {path.relative_to(checkpoint).as_posix(): measure(path) for path in sorted(paths)}
    write_json(Path(checkpoint) / MANIFEST, entries)


def _serves_resuming(path: Path) -> bool:
    return path.name != "training_args.bin" and RESUMING.fullmatch(path.name) is not None


def measure(path: Path) -> dict[str, int]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        checksum = zlib.crc32(file.read(CHECKED_BYTES))
        file.seek(max(size - CHECKED_BYTES, file.tell()))
        checksum = zlib.crc32(file.read(CHECKED_BYTES), checksum)
    return {"bytes": size, "crc32_of_the_ends": checksum}


def _require_as_written(checkpoint: Path) -> None:
    path = checkpoint / MANIFEST
    if not path.exists():  # TRL's, or an older version's
        return
    for name, entry in read_json(path).items():
        if not (checkpoint / name).is_file():
            raise Fault(f"{name} is missing")
        if measure(checkpoint / name) != entry:
            raise Fault(f"{name} is not as it was written")


def sync(folder: str | Path) -> None:
    """Return when all files below a folder, and their names, are on the disk."""
    for path in [Path(folder).parent, Path(folder), *Path(folder).rglob("*")]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
