"""Drawing completions with vLLM, where it is installed and asked for. Not run by any test."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for `max_lora_rank`


def max_lora_rank(rank: int) -> int:
    """The smallest of vLLM's sizes that adapters of this rank fit in.

    Raises:
        `ValueError`: if there is none.
    """
    for size in LORA_RANKS:
        if size >= rank:
            return size
    raise ValueError(f"`use_vllm=True` takes adapters of rank {LORA_RANKS[-1]} at most, got `lora_r={rank}`.")


class Engine:
    """A vLLM engine with pi_0, an adapter on it, or a whole model."""

    def __init__(self, model_args: Any, policy: Path | None, memory: float):
        """`memory`: the share of the GPU's memory that it may take."""
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        is_adapter = policy is not None and model_args.use_peft
        name = model_args.model_name_or_path if policy is None or is_adapter else str(policy)
        dtype = model_args.dtype or "auto"
        lora = {"enable_lora": True, "max_lora_rank": max_lora_rank(model_args.lora_r)} if is_adapter else {}
        self.llm = LLM(name, dtype=dtype, gpu_memory_utilization=memory, **lora)
        self.adapter = LoRARequest("policy", 1, str(policy)) if is_adapter else None

    def draw(self, prompts: list[list[int]], generation: Any, end_tokens: set[int], seed: int) -> list[list[int]]:
        from vllm import SamplingParams

        parameters = [
            SamplingParams(
                max_tokens=generation.max_completion_length,
                temperature=generation.temperature,
                top_p=generation.top_p,
                top_k=generation.top_k,
                stop_token_ids=sorted(end_tokens),
                seed=(seed + i) % 2**63,
            )
            for i in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = self.llm.generate(inputs, parameters, lora_request=self.adapter)
        return [list(output.outputs[0].token_ids) for output in outputs]


@contextmanager
def vllm_engine(model_args: Any, policy: Path | None, memory: float) -> Iterator[Engine]:
    """An engine that is gone afterwards, with its memory."""
    import gc

    import torch

    engine = Engine(model_args, policy, memory)
    try:
        yield engine
    finally:
        del engine.llm
        gc.collect()
        torch.cuda.empty_cache()
