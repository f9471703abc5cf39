"""What `trl-rdro inspect` computes, from Python: the same on rows that TRL has prepared."""

from types import SimpleNamespace

from datasets import Dataset

from trl_rdro.compat.trl import prepare_dataset
from trl_rdro.tools.inspection import inspect_rows, report_lines, row_lines
from trl_rdro.tools.scoring import _Settings

from ..tiny import tiny_preferences, tiny_tokenizer


def test_inspection_counts_rows_tokens_and_what_is_wrong():
    rows = tiny_preferences(6).to_list()
    rows[2]["rejected"] = rows[2]["chosen"]
    tokenizer, args = tiny_tokenizer(), SimpleNamespace(max_length=20)
    prepared, collator = prepare_dataset("dpo", Dataset.from_list(rows), tokenizer, _Settings(max_length=None))
    inspection = inspect_rows("dpo", prepared, len(rows), args, tokenizer)
    for name, column in (("prompt", "prompt_ids"), ("chosen", "chosen_ids"), ("rejected", "rejected_ids")):
        assert inspection.lengths[name] == [len(ids) for ids in prepared[column]]
    longest = [
        len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in prepared.to_list()
    ]
    assert inspection.longest == longest
    assert inspection.truncated == [i for i, length in enumerate(longest) if length > 20]
    assert inspection.rows == 6 and inspection.dropped == 0
    assert inspection.findings["EQUAL: chosen and rejected are the same"] == [2]
    assert any("EQUAL" in line and "1 of 6 rows, e.g. --row 2" in line for line in report_lines(inspection))
    text = "\n".join(row_lines("dpo", collator, prepared[0], tokenizer))
    assert "\033" not in text and rows[0]["prompt"] in text and rows[0]["chosen"].strip() in text
