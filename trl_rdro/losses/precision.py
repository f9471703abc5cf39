"""The precision in which losses are computed, whatever the log-ratios come in."""

import torch


def as_float(x: torch.Tensor) -> torch.Tensor:
    """Half precision to float32, where the losses are computed; float32 and float64 pass unchanged."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def margins(chosen: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """h, `(n,)`: the log-ratio of the chosen minus that of the rejected completion."""
    return as_float(chosen) - as_float(rejected)
