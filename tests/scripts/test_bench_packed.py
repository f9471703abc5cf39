"""`scripts/bench_packed.py`: that it compares what it says, and goes on. Nothing depends on how fast anything is."""

import itertools
import json
import sys

import bench_flops
import bench_packed
import bench_table
import numpy as np
import pytest
from bench_lengths import CORPORA, grouped


def test_the_cells_that_ship():
    cells = bench_packed.read_cells(bench_packed.CELLS)
    assert len({cell.name for cell in cells}) == len(cells)
    for cell, model in itertools.product(cells, bench_packed.MODELS):
        ours, theirs = bench_packed.runs_of(cell, model)
        assert (ours.model, ours.method, ours.checkpointing) == (theirs.model, theirs.method, theirs.checkpointing)
        assert cell.corpus in (*CORPORA, "filled") and cell.order in ("random", "grouped")
        assert (ours.lengths, ours.length, ours.grouped) == (theirs.lengths, theirs.length, theirs.grouped)
        assert ours.batch * ours.accumulation == theirs.batch * theirs.accumulation
        assert dict(ours.settings)["padding_free"] and dict(ours.settings)["share_prompt"] == ("shared" in cell.ours)


@pytest.mark.slow
def test_a_bench_that_was_killed_goes_on(tmp_path, monkeypatch):
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 300}
    monkeypatch.setattr(bench_packed, "MODELS", {"small": {"model": tiny}})
    monkeypatch.setattr(bench_packed, "LENGTHS", dict.fromkeys(CORPORA, 64))
    cells, output = tmp_path / "cells.txt", tmp_path / "found.jsonl"
    lines = [
        "# a comment",
        "UltraFeedback-like | 1 | 2 | random | kldpo shared | stock | 1.8 | 0.6",
        "UltraFeedback-like | 2 | 1 | grouped | wdpo one_sided packed | stock | |",
    ]

    def run(count: int) -> list[dict]:
        cells.write_text("\n".join(lines[:count]))
        argv = ["--cells", cells, "--output", output, "--rounds", "1", "--pairs", "2"]
        monkeypatch.setattr(sys, "argv", ["bench_packed.py", *map(str, argv)])
        assert bench_packed.main() == 0
        return [json.loads(line) for line in output.read_text().splitlines()]

    first = run(2)
    both = run(3)
    assert both[0] == first[0] and [row["ours"] for row in both] == ["kldpo shared", "wdpo one_sided packed"]
    assert all(row["pairs_per_second"][0] > 0 and row["versions"]["trl"] and row["date"] for row in both)
    assert min(both[0]["bytes"]) > 0 and "bytes" not in both[1]
    table = bench_table.packed_table(both)
    assert f"{both[0]['processor']['ratio']:.2f}" in table and "grouped by length" in table and "≥ 1.80" in table


def test_a_ratio_is_that_of_whole_rounds():
    found = bench_packed.ratio(np.array([1.0, 3.0]), np.array([2.0, 10.0]))
    assert found["ratio"] == 3.0 and found["low"] == 2.0 and found["high"] == pytest.approx(10 / 3)


def test_batches_in_order_of_length_are_alike():
    pairs = grouped("UltraFeedback-like", 40, 2048, 4)
    longest = np.array([prompt + max(sides) for prompt, *sides in pairs]).reshape(-1, 4)
    assert np.ptp(longest, axis=1).mean() < 0.1 * np.ptp(longest)


def test_operations():
    """Of a pair without padding, the linear layers once for each token; a shared prompt but its last token once."""
    pairs = [(100, 50, 50)]
    stock, packed, shared = (
        bench_flops.forward_flops("Qwen2.5-7B", pairs, kind) for kind in ("stock", "packed", "shared")
    )
    assert stock == packed
    assert 1 - shared / packed == pytest.approx(99 / 300, rel=0.1)
    # Twice the padding, twice the linear layers; scored on a CPU, not on a GPU
    wide = [(100, 50, 50), (100, 350, 350)]
    assert bench_flops.forward_flops("here", wide, "stock") > 1.4 * bench_flops.forward_flops("here", wide, "packed")
    assert bench_flops.passes("sigmoid shared") == bench_flops.passes("kldpo shared") == 4
    assert (bench_flops.passes("wdpo packed"), bench_flops.passes("wdpo one_sided packed")) == (9, 7)
