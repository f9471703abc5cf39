"""
A small preference data set of real human judgements that comes with the package, for first runs without a hub.

    from trl_rdro.quickstart import load_quickstart

    train, test = load_quickstart("train"), load_quickstart("test")

`QUICKSTART_DIR` is its folder, which `datasets.load_dataset` and the `dataset_name` of a TRL command also take.
"""

from importlib.resources import files

from datasets import Dataset


QUICKSTART_DIR = str(files("trl_rdro") / "data" / "quickstart")


def load_quickstart(split: str = "train", unpaired: bool = False) -> Dataset:
    """
    Load the quickstart data in TRL's (explicit prompt, not conversational) preference format.

    People rated single texts for sentiment; the pair (a positively and a negatively rated text of one domain) and the
    prompt are constructed, and the preference axis is positivity. See the README in `QUICKSTART_DIR`.

    Args:
        split (`str`): `"train"` or `"test"`. No text is in both.
        unpaired (`bool`): take each pair apart into two rows `prompt`, `completion`, `label` instead of one row
            `prompt`, `chosen`, `rejected`; half of the labels are `True`. The columns about the pair become `domain`,
            `mean` and `sd` of the one text.
    """
    if split not in ("train", "test"):
        raise ValueError(f"The quickstart data has no split {split!r}. Choose 'train' or 'test'.")
    dataset = Dataset.from_json(f"{QUICKSTART_DIR}/{split}.jsonl")
    if not unpaired:
        return dataset
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": row[side],
                "label": side == "chosen",
                "domain": row["domain"],
                "mean": row[f"{side}_mean"],
                "sd": row[f"{side}_sd"],
            }
            for row in dataset
            for side in ("chosen", "rejected")
        ]
    )
