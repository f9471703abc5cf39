"""
Train on unpaired completions labelled good or bad. `trl-rdro kto` does the same and launches itself.

# Full training
```bash
accelerate launch scripts/kto.py \
    --dataset_name trl-lib/kto-mix-14k \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --loss_type rdro \
    --learning_rate 5.0e-7 \
    --lr_scheduler_type cosine \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --output_dir Qwen2.5-0.5B-RDRO
```

# LoRA
```bash
accelerate launch scripts/kto.py \
    --dataset_name trl-lib/kto-mix-14k \
    --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
    --loss_type ddro \
    --learning_rate 5.0e-6 \
    --lr_scheduler_type cosine \
    --num_train_epochs 1 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 4 \
    --output_dir Qwen2.5-0.5B-DDRO-LoRA \
    --use_peft \
    --lora_r 16 \
    --lora_alpha 16
```

# QLoRA
As LoRA, with
```bash
    --load_in_4bit \
    --lora_target_modules all-linear
```

A YAML file holds the same options: `accelerate launch scripts/kto.py --config my.yaml`.
"""

import sys

from trl_rdro.run.signals import end_on_signals


if __name__ == "__main__":  # before the import below, which takes seconds
    end_on_signals()

from trl_rdro.cli.train import main


if __name__ == "__main__":
    sys.exit(main("kto"))
