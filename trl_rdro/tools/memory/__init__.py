"""
What each GPU will hold during training, computed before anything is loaded.

Parameters are counted on a model without data (torch's "meta" device) built from its config (`model`). Activations are
what autograd keeps of a Llama-like decoder layer (RMSNorm, grouped-query attention, gated MLP), written out term by
term in `step.layer_bytes`. A step is a sequence of moments, each with its own set of live tensors, and the estimate is
the largest: adding up all that is ever allocated would overshoot by a third. `docs/estimate.md` states the assumptions
and how the figures compare with measured ones.

    shape = read_shape(AutoConfig.from_pretrained("Qwen/Qwen2.5-0.5B-Instruct"))
    estimate(shape, Run(length=1024, batch=8, gpus=8, engine="deepspeed", stage=3)).total / GIB

Everything is in bytes. Nothing here knows the command line.
"""

from .advice import as_dict, knobs, savings
from .model import Shape, read_shape
from .peak import CARDS, GIB, RESERVE, Estimate, estimate
from .persistent import trainable
from .run import Run, engine_of, processes_of, run_of


__all__ = [
    "CARDS",
    "GIB",
    "RESERVE",
    "Estimate",
    "Run",
    "Shape",
    "as_dict",
    "engine_of",
    "estimate",
    "knobs",
    "processes_of",
    "read_shape",
    "run_of",
    "savings",
    "trainable",
]
