"""
Write the quickstart's pairs with the column `group`, which `grdpo` reads: the kind of text (film, product, tweet or
editorial).

    python scripts/quickstart_groups.py data/quickstart-groups
"""

import argparse
import sys
from pathlib import Path

from trl_rdro.quickstart import load_quickstart


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path, help="gets train.jsonl and test.jsonl")
    output_dir = parser.parse_args(argv).output_dir
    output_dir.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = load_quickstart(split).rename_column("domain", "group")
        rows.select_columns(["prompt", "chosen", "rejected", "group"]).to_json(output_dir / f"{split}.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
