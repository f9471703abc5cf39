"""The script that builds the quickstart data: what it accepts, what it makes of it, and that it makes it again."""

import io
import json
import sys
import tarfile
from collections import Counter

import build_quickstart_data as builder
import pytest

from trl_rdro.quickstart import load_quickstart


def test_a_wrong_file_is_refused(tmp_path, monkeypatch):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz"):
        pass
    sdist = tmp_path / "vaderSentiment-3.3.2.tar.gz"
    sdist.write_bytes(content.getvalue())
    monkeypatch.setattr(sys, "argv", ["build", "--sdist", str(sdist), "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="refusing"):
        builder.main()
    assert not (tmp_path / "out").exists()


def test_the_inner_archive_is_verified_too():
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as sdist:
        for name in (f"{builder.SDIST_ROOT}/LICENSE.txt", builder.RATINGS_MEMBER):
            member = tarfile.TarInfo(name)
            member.size = 3
            sdist.addfile(member, io.BytesIO(b"MIT"))
    with pytest.raises(SystemExit, match="hutto_ICWSM_2014.*refusing"):
        builder.read_sdist(content.getvalue())


def test_ratings_are_joined_by_id_and_contradictions_left_out():
    truth = ["7\t1.5\t good  film ", "2_1\t-2\tbad\tfilm", "3\t1.44\tyay"]
    rated = ["3\t2.26\t0.98\t[2, 3]", "2_1\t-2.0\t1.0\t[-1, -3]", "7\t1.5\t0.5\t[1, 2]"]
    first, second = builder.join_ratings(truth, rated)
    assert first == builder.RatedText("good film", 1.5, 0.5, (1, 2))
    assert second == builder.RatedText("bad film", -2.0, 1.0, (-1, -3))


def test_disagreement_counts_pairs_of_raters():
    chosen = builder.RatedText("", 1.0, 0.0, (3, 1, -1))
    rejected = builder.RatedText("", -1.0, 0.0, (-2, 1))
    # 3 beats both; 1 beats -2 and ties 1; -1 beats -2 and loses to 1
    assert builder.disagreement(chosen, rejected) == pytest.approx(1.5 / 6)


def synthetic():
    texts = {
        domain.name: [
            builder.RatedText(" ".join([f"{domain.name}{i}"] * (4 + i // 8 % 2)), mean, 0.5, (round(mean),))
            for i, mean in enumerate([2.0, -2.0, 1.0, -3.0, 3.0, -1.5, 1.5, -1.0] * 4)
        ]
        for domain in builder.DOMAINS
    }
    texts["tweet"].append(builder.RatedText("far too short", 4.0, 0.0, (4,)))
    texts["tweet"].append(builder.RatedText("long " * 21, 4.0, 0.0, (4,)))
    texts["film"].append(texts["tweet"][0])  # a text that occurs in two domains
    return texts


def test_build_pairs_within_domains_and_splits_by_text():
    splits = builder.build(synthetic(), test_pairs=3, max_train_pairs=7)
    assert Counter(row["domain"] for row in splits["test"]) == {domain.name: 3 for domain in builder.DOMAINS}
    assert Counter(row["domain"] for row in splits["train"]) == {domain.name: 7 for domain in builder.DOMAINS}
    rows = splits["train"] + splits["test"]
    texts = [row[side] for row in rows for side in ("chosen", "rejected")]
    assert len(texts) == len(set(texts))
    for row in rows:
        assert row["domain"] in row["rejected"]
        assert row["chosen_mean"] >= 1.25 and row["rejected_mean"] <= -1.25
        assert 4 <= len(row["chosen"].split()) == len(row["rejected"].split()) <= 20


def test_build_depends_on_the_content_alone(tmp_path):
    for folder, texts in (("a", synthetic()), ("b", synthetic())):
        if folder == "b":
            texts = {name: list(reversed(rows)) for name, rows in texts.items()}
        builder.write(builder.build(texts, 3, 7), "MIT\r\n", tmp_path / folder)
    for name in ("train.jsonl", "test.jsonl", "LICENSE"):
        content = (tmp_path / "a" / name).read_bytes()
        assert content and content == (tmp_path / "b" / name).read_bytes()
    assert (tmp_path / "a" / "LICENSE").read_bytes() == b"MIT\n"
    rows = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    assert all(list(row) == list(load_quickstart("train").features) for row in rows)
