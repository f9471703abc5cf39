"""
Train on pairs with any of the losses, built-in or ours. `trl-rdro dpo` does the same and launches itself.

# Full training
```bash
accelerate launch scripts/dpo.py \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --loss_type rdro \
    --learning_rate 5.0e-7 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --eval_strategy steps \
    --eval_steps 50 \
    --output_dir Qwen2.5-0.5B-RDRO
```

# LoRA
```bash
accelerate launch scripts/dpo.py \
    --dataset_name trl-lib/ultrafeedback_binarized \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --loss_type kldpo \
    --learning_rate 5.0e-6 \
    --num_train_epochs 1 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 8 \
    --eval_strategy steps \
    --eval_steps 50 \
    --output_dir Qwen2.5-0.5B-KLDPO-LoRA \
    --use_peft \
    --lora_r 32 \
    --lora_alpha 16
```

# QLoRA
As LoRA, with
```bash
    --load_in_4bit \
    --lora_target_modules all-linear
```

A YAML file holds the same options: `accelerate launch scripts/dpo.py --config recipes/quickstart.yaml`.
"""

import sys

from trl_rdro.run.signals import end_on_signals


if __name__ == "__main__":  # before the import below, which takes seconds
    end_on_signals()

from trl_rdro.cli.train import main


if __name__ == "__main__":
    sys.exit(main("dpo"))
