"""What a user writes, for the type checker alone (`make types`): nothing of it runs. A comment that expects an error
fails when there is none."""

from trl_rdro import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer


DPOConfig(output_dir="out", loss_type="rdro")
DPOConfig(output_dir="out", loss_type=["rdro", "sft"], loss_weights=[1.0, 0.1], beta=0.1)
DPOTrainer("model", args=DPOConfig("out", loss_type="kldpo", kldpo_tau=0.05)).train(resume_from_checkpoint=True)
DPOConfig("out", loss_type=5)  # type: ignore[arg-type]
DPOConfig("out", kldpo_tau="sharp")  # type: ignore[arg-type]
DPOConfig("out", kldpo_temperature=1.0)  # type: ignore[call-arg]

args = KTOConfig(output_dir="out", loss_type="rdro", preferred_fraction=0.4)
trainer = KTOTrainer("model", args=args)
fraction: float | None = trainer.args.preferred_fraction
print(trainer.args.preferred_share)  # type: ignore[attr-defined]
KTOConfig("out", loss_type=["rdro"])  # type: ignore[arg-type]
