"""
Rounds of sampling, judging and training. `trl-rdro iterate` does the same and launches itself.

```bash
accelerate launch scripts/iterate.py --config recipes/iterate.yaml --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct
```

docs/iterate.md describes the options.
"""

import sys

from trl_rdro.run.signals import end_on_signals


if __name__ == "__main__":  # before the import below, which takes seconds
    end_on_signals()

from trl_rdro.cli.iterate import run


if __name__ == "__main__":
    sys.exit(run())
