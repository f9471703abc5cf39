"""Where the numbers of a training configuration must lie: ours, TRL's, and those of transformers and PEFT that end
in silence when they are wrong. Bounds of our losses are such that the losses stay finite in float32.

A field that a library's version does not have is passed over."""

from .validation import Range


COUNT = Range("[1, inf)")
BATCH = Range("[1, 1e6]")  # rows of tokens in memory
PROCESSES = Range("[0, 1024]")
NOT_NEGATIVE = Range("[0, inf)")
# A share or a temperature beyond these vanishes or overflows in float32 once it is inverted
SHARE = Range("[1e-9, 0.999999]", "Leave it None to use the preferred fraction of the training set.")
LARGEST = "1e9"
POSITIVE = Range(f"[1e-9, {LARGEST}]")

LOSS_RANGES = {
    "ddro_t": SHARE,
    "ddro_cap": Range("[1e-9, 0.999999]", "The default is 0.99."),
    "rdro_alpha": SHARE,
    "preferred_fraction": Range("[1e-9, 0.999999]", "Leave it None to have it counted on the training set."),
    "kldpo_tau": Range(
        f"[1e-6, {LARGEST}]",
        "Large values approach DPO; a negative one would be Dr. DPO, `loss_type: drdpo`.",
    ),
    "kldpo_target_ess": Range("[1e-6, 0.999999]", "Leave it None to set `kldpo_tau`."),
    "drdpo_beta": Range(f"[1e-6, {LARGEST}]", "Large values approach DPO."),
    "grdpo_eta": Range(f"[0, {LARGEST}]", "0 leaves all groups equal."),
    "wdpo_rho": Range(f"[0, {LARGEST}]", "0 is plain DPO."),
    "wdpo_interval": COUNT,
    "holder_gamma": POSITIVE,
    "ropo_alpha": POSITIVE,
    "repo_eta": Range("[1e-9, 1]", "1 is DPO."),
    "repo_rate": Range("[0, 1]"),
    "chipo_clip": POSITIVE,
    "dpop_lambda": Range(f"[0, {LARGEST}]", "0 is plain DPO."),
    "adadpo_rho0": POSITIVE,
    "adadpo_tau_min": POSITIVE,
    "adadpo_tau_max": POSITIVE,
    "dpopro_rho": Range(f"[0, {LARGEST}]", "0 is soft-label DPO."),
    "mrpo_alpha": Range("[0, 1]", "Leave it None to have it chosen for each pair."),
    "wdpo_eps": Range("[1e-9, 1)", "Leave it None to have it chosen by the dtype and adapted."),
}
TRL_RANGES = {
    "beta": Range(f"[0, {LARGEST}]"),
    "loss_weights": Range(f"[0, {LARGEST}]"),
    "label_smoothing": Range("[0, 1)", "It is the assumed probability that a label is flipped."),
    "desirable_weight": Range(f"[0, {LARGEST}]"),
    "undesirable_weight": Range(f"[0, {LARGEST}]"),
    "ld_alpha": Range("[0, 1]", "Leave it None to count every token."),
    "f_alpha_divergence_coef": Range("[-1000, 1000]"),
    "discopop_tau": Range(f"[1e-6, {LARGEST}]"),
    "router_aux_loss_coef": Range(f"[0, {LARGEST}]"),
    "ref_model_mixup_alpha": Range("[0, 1]"),
    "ref_model_sync_steps": COUNT,
    "max_length": Range("[1, inf)", "Leave it None never to truncate."),
    "pad_to_multiple_of": Range("[1, 65536]"),
    "dataset_num_proc": Range("[1, 1024]"),
    "precompute_ref_batch_size": BATCH,
}
TRANSFORMERS_RANGES = {
    "learning_rate": Range("[0, 1000]"),
    "weight_decay": Range("[0, 1000]"),
    "adam_beta1": Range("[0, 1)"),
    "adam_beta2": Range("[0, 1)"),
    "adam_epsilon": Range("[0, 1]"),
    "max_grad_norm": Range("[0, inf)", "0 does not clip."),
    "warmup_steps": Range("[0, inf)", "Below 1 it is a share of all steps."),
    "neftune_noise_alpha": Range("[0, 1000]", "Leave it None for no noise."),
    "label_smoothing_factor": Range("[0, 1)", "Preference losses do not read it: see `label_smoothing`."),
    "num_train_epochs": Range("(0, 1e6]"),
    "max_steps": Range("[1, inf)", "-1 is `num_train_epochs` epochs.", also=-1),
    "per_device_train_batch_size": BATCH,
    "per_device_eval_batch_size": BATCH,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "logging_steps": NOT_NEGATIVE,
    "save_steps": Range("(0, inf)", "To save nothing, set `save_strategy: no`."),
    "eval_steps": Range("[0, inf)", "To evaluate never, set `eval_strategy: no`."),
    "eval_delay": NOT_NEGATIVE,
    "save_total_limit": Range("[1, inf)", "Leave it None to keep all."),
    "seed": Range("[0, 4294967295]"),
    "data_seed": Range("[0, 4294967295]"),
    "dataloader_num_workers": PROCESSES,
    "dataloader_prefetch_factor": COUNT,
    "torch_empty_cache_steps": COUNT,
    "local_rank": Range("[-1, inf)", "The launcher sets it."),
    "ddp_timeout": COUNT,
    "ddp_bucket_cap_mb": COUNT,
}
PEFT_RANGES = {"lora_r": Range("[1, 65536]"), "lora_alpha": COUNT, "lora_dropout": Range("[0, 1)")}
DATA_RANGES = {"test_split_size": Range("(0, 1)", "It is a share of the rows; leave it None for no test split.")}
RANGES = {**DATA_RANGES, **PEFT_RANGES, **LOSS_RANGES, **TRL_RANGES, **TRANSFORMERS_RANGES}
