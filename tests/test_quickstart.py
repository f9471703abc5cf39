"""The quickstart data as packaged, the script that builds it, and the curves of a run."""

import importlib
import io
import json
import math
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import load_dataset

from trl_rdro.quickstart import QUICKSTART_DIR, load_quickstart
from trl_rdro.tools.plotting import plot_log_history

from .tiny import save_tiny


SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
COLUMNS = {
    "prompt": "string",
    "chosen": "string",
    "rejected": "string",
    "domain": "string",
    "chosen_mean": "float64",
    "rejected_mean": "float64",
    "chosen_sd": "float64",
    "rejected_sd": "float64",
    "rater_disagreement": "float64",
}


@pytest.fixture(scope="module")
def builder():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("build_quickstart_data")


@pytest.fixture(scope="module")
def demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPTS)
        yield importlib.import_module("demo")


@pytest.fixture(scope="module", params=["train", "test"])
def split(request):
    return load_quickstart(request.param)


class TestPackagedData:
    def test_columns_are_flat_and_typed(self, split):
        assert {name: feature.dtype for name, feature in split.features.items()} == COLUMNS

    def test_no_text_occurs_twice_in_all_the_data(self):
        texts = Counter()
        for name in ("train", "test"):
            dataset = load_quickstart(name)
            texts.update(dataset["chosen"])
            texts.update(dataset["rejected"])
        assert texts.most_common(1)[0][1] == 1

    def test_sizes(self):
        assert len(load_quickstart("train")) >= 1000
        assert Counter(load_quickstart("test")["domain"]) == {"tweet": 64, "film": 64, "product": 64, "editorial": 64}
        assert set(load_quickstart("train")["domain"]) == {"tweet", "film", "product", "editorial"}
        assert sum(file.stat().st_size for file in Path(QUICKSTART_DIR).iterdir()) < 1_000_000

    def test_each_domain_has_one_prompt(self, split):
        assert len(set(zip(split["domain"], split["prompt"], strict=True))) == 4

    def test_people_rated_chosen_above_rejected(self, split, builder):
        for row in split:
            assert row["chosen_mean"] >= builder.MIN_ABS_MEAN
            assert row["rejected_mean"] <= -builder.MIN_ABS_MEAN
            assert 0 <= row["rater_disagreement"] < 0.5

    def test_length_does_not_give_the_preference_away(self, split):
        for row in split:
            assert len(row["chosen"].split()) == len(row["rejected"].split())

    def test_first_rows_mix_the_domains(self):
        counts = Counter(load_quickstart("test")[:64]["domain"])
        assert min(counts.values()) >= 6

    def test_load_dataset_finds_the_splits(self, tmp_path):
        dataset = load_dataset(QUICKSTART_DIR, cache_dir=str(tmp_path))
        assert set(dataset) == {"train", "test"}
        assert dataset["test"].to_list() == load_quickstart("test").to_list()

    def test_carries_its_licence(self):
        notice = (Path(QUICKSTART_DIR) / "LICENSE").read_text()
        assert "MIT" in notice and "C.J. Hutto" in notice and "shall be included" in notice

    def test_unpaired_is_the_pairs_taken_apart(self, split):
        name = "train" if len(split) == len(load_quickstart("train")) else "test"
        unpaired = load_quickstart(name, unpaired=True)
        assert unpaired.features["label"].dtype == "bool"
        expected = []
        for row in split:
            expected.append((row["prompt"], row["chosen"], True, row["chosen_mean"]))
            expected.append((row["prompt"], row["rejected"], False, row["rejected_mean"]))
        columns = (unpaired[name] for name in ("prompt", "completion", "label", "mean"))
        assert list(zip(*columns, strict=True)) == expected

    def test_unknown_split_is_refused(self):
        with pytest.raises(ValueError, match="no split 'validation'"):
            load_quickstart("validation")


class TestBuild:
    def test_a_wrong_file_is_refused(self, builder, tmp_path, monkeypatch):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz"):
            pass
        sdist = tmp_path / "vaderSentiment-3.3.2.tar.gz"
        sdist.write_bytes(content.getvalue())
        monkeypatch.setattr(sys, "argv", ["build", "--sdist", str(sdist), "--output_dir", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match="refusing"):
            builder.main()
        assert not (tmp_path / "out").exists()

    def test_the_inner_archive_is_verified_too(self, builder):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as sdist:
            for name in (f"{builder.SDIST_ROOT}/LICENSE.txt", builder.RATINGS_MEMBER):
                member = tarfile.TarInfo(name)
                member.size = 3
                sdist.addfile(member, io.BytesIO(b"MIT"))
        with pytest.raises(SystemExit, match="hutto_ICWSM_2014.*refusing"):
            builder.read_sdist(content.getvalue())

    def test_ratings_are_joined_by_id_and_contradictions_left_out(self, builder):
        truth = ["7\t1.5\t good  film ", "2_1\t-2\tbad\tfilm", "3\t1.44\tyay"]
        rated = ["3\t2.26\t0.98\t[2, 3]", "2_1\t-2.0\t1.0\t[-1, -3]", "7\t1.5\t0.5\t[1, 2]"]
        first, second = builder.join_ratings(truth, rated)
        assert first == builder.RatedText("good film", 1.5, 0.5, (1, 2))
        assert second == builder.RatedText("bad film", -2.0, 1.0, (-1, -3))

    def test_disagreement_counts_pairs_of_raters(self, builder):
        chosen = builder.RatedText("", 1.0, 0.0, (3, 1, -1))
        rejected = builder.RatedText("", -1.0, 0.0, (-2, 1))
        # 3 beats both; 1 beats -2 and ties 1; -1 beats -2 and loses to 1
        assert builder.disagreement(chosen, rejected) == pytest.approx(1.5 / 6)

    def synthetic(self, builder):
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

    def test_build_pairs_within_domains_and_splits_by_text(self, builder):
        splits = builder.build(self.synthetic(builder), test_pairs=3, max_train_pairs=7)
        assert Counter(row["domain"] for row in splits["test"]) == {domain.name: 3 for domain in builder.DOMAINS}
        assert Counter(row["domain"] for row in splits["train"]) == {domain.name: 7 for domain in builder.DOMAINS}
        rows = splits["train"] + splits["test"]
        texts = [row[side] for row in rows for side in ("chosen", "rejected")]
        assert len(texts) == len(set(texts))
        for row in rows:
            assert row["domain"] in row["rejected"]
            assert row["chosen_mean"] >= 1.25 and row["rejected_mean"] <= -1.25
            assert 4 <= len(row["chosen"].split()) == len(row["rejected"].split()) <= 20

    def test_build_depends_on_the_content_alone(self, builder, tmp_path):
        for folder, texts in (("a", self.synthetic(builder)), ("b", self.synthetic(builder))):
            if folder == "b":
                texts = {name: list(reversed(rows)) for name, rows in texts.items()}
            builder.write(builder.build(texts, 3, 7), "MIT\r\n", tmp_path / folder)
        for name in ("train.jsonl", "test.jsonl", "LICENSE"):
            content = (tmp_path / "a" / name).read_bytes()
            assert content and content == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / "LICENSE").read_bytes() == b"MIT\n"
        rows = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
        assert all(list(row) == list(COLUMNS) for row in rows)


def is_png(path):
    content = path.read_bytes()
    return content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"


class TestPlot:
    HISTORY = [
        {"step": 0, "eval_loss": 1.386, "eval_rewards/accuracies": 0.5, "eval_logratios/chosen": 0.0},
        {"step": 1, "loss": 1.39, "logratios/chosen": 0.0, "logratios/rejected": 0.0, "rewards/accuracies": 0.4},
        {"step": 2, "loss": 1.31, "logratios/chosen": 0.2, "logratios/rejected": -0.3, "rewards/accuracies": 0.7},
        {"step": 2, "eval_loss": 1.33, "eval_rewards/accuracies": 0.7, "eval_logratios/chosen": 0.1},
        {"step": 2, "train_runtime": 3.0, "train_loss": 1.35},
    ]

    @pytest.mark.parametrize(
        "history",
        [
            HISTORY,
            {"rdro": HISTORY, "ddro": HISTORY[1:]},
            [{"step": 1, "loss": 1.4}],
            [{"step": 1, "eval_rewards/accuracies": 0.4}],
            [],
        ],
        ids=["one-run", "two-runs", "loss-only", "evaluation-only", "nothing"],
    )
    def test_writes_a_png(self, history, tmp_path):
        path = plot_log_history(history, tmp_path / "new folder" / "curves.png")
        assert path == tmp_path / "new folder" / "curves.png"
        assert is_png(path)

    def test_every_logged_point_is_drawn(self, tmp_path, monkeypatch):
        import trl_rdro.tools.plotting as plotting

        figures = []

        class Recording(plotting.Figure):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                figures.append(self)

        monkeypatch.setattr(plotting, "Figure", Recording)
        plot_log_history({"a": self.HISTORY, "b": self.HISTORY[1:3]}, tmp_path / "curves.png")
        loss, logratio, accuracy = figures[0].axes
        drawn = {line.get_label(): line.get_xydata().tolist() for line in loss.lines}
        assert drawn == {
            "a train": [[1, 1.39], [2, 1.31]],
            "a held-out": [[0, 1.386], [2, 1.33]],
            "b train": [[1, 1.39], [2, 1.31]],
        }
        assert [line.get_label() for line in logratio.lines] == [
            "a chosen train",
            "a chosen held-out",
            "a rejected train",
            "b chosen train",
            "b rejected train",
        ]
        assert len(accuracy.lines) == 3

    def test_a_panel_without_data_says_so(self, tmp_path, monkeypatch):
        import trl_rdro.tools.plotting as plotting

        figures = []
        subplots = plotting.Figure.subplots

        def record(figure, *args, **kwargs):
            figures.append(figure)
            return subplots(figure, *args, **kwargs)

        monkeypatch.setattr(plotting.Figure, "subplots", record)
        plot_log_history([{"step": 1, "loss": 1.4}], tmp_path / "curves.png")
        texts = [[text.get_text() for text in axes.texts] for axes in figures[0].axes]
        assert texts == [[], ["not logged"], ["not logged"]]


class TestDemo:
    def test_ties_count_one_half(self, demo):
        scores = torch.tensor(
            [[1.0, 1.0, 1.0, 1.0], [0.0, 1.0, -2.0, 3.0], [0.0, 0.0, -1.0, 3.0]], dtype=torch.float64
        )
        values = demo.held_out(scores, kldpo_tau=None)
        assert values["accuracy"].tolist() == [0.5, 1.0, 0.0, 0.5]
        assert torch.equal(values["loss"], scores[0])

    def test_kldpo_loss_is_that_of_the_whole_held_out_set(self, demo):
        scores = torch.rand(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values = demo.held_out(scores, kldpo_tau=0.3)
        expected = 0.3 * math.log(sum(math.exp(loss / 0.3) for loss in scores[0].tolist()) / 50)
        assert values["loss"].mean().item() == pytest.approx(expected)

    def test_standard_error_of_kldpo_loss_against_resampling(self, demo):
        generator = torch.Generator().manual_seed(0)
        population = torch.rand(2000, 200, generator=generator, dtype=torch.float64)
        means = torch.stack([demo.held_out((row, row, row), 0.5)["loss"].mean() for row in population])
        estimate = demo.mean_and_error(demo.held_out((population[0],) * 3, 0.5)["loss"])["standard_error"]
        assert estimate == pytest.approx(means.std().item(), rel=0.15)

    def test_batches_are_distinct_pairs_of_similar_length(self, demo):
        settings = demo.Settings(steps=10, learning_rate=0.0)
        selected = demo.training_data(settings, seed=3, unpaired=False)
        assert len(set(selected["chosen"])) == 80
        lengths = [len(text) for text in selected["chosen"]]
        spreads = [max(lengths[i : i + 8]) - min(lengths[i : i + 8]) for i in range(0, 80, 8)]
        assert sorted(spreads)[5] < (max(lengths) - min(lengths)) / 5
        assert demo.training_data(settings, 3, unpaired=False)["chosen"] == selected["chosen"]
        assert demo.training_data(settings, 4, unpaired=False)["chosen"] != selected["chosen"]
        unpaired = demo.training_data(settings, 3, unpaired=True)
        assert set(unpaired["completion"]) == {*selected["chosen"], *selected["rejected"]}

    def test_a_loss_without_unpaired_form_is_refused(self, demo, monkeypatch, capsys):
        monkeypatch.setattr(sys, "argv", ["demo", "--loss", "kldpo", "--data", "unpaired"])
        with pytest.raises(SystemExit):
            demo.main()
        assert "kldpo compares the two texts of a pair" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("loss", "data"),
        [(loss, "paired") for loss in ("rdro", "ddro", "kldpo", "wdpo")]
        + [(loss, "unpaired") for loss in ("rdro", "ddro")],
    )
    def test_runs_and_measures(self, demo, loss, data, tmp_path, monkeypatch):
        monkeypatch.setattr(demo, "HELD_OUT_PAIRS", 6)
        out = tmp_path / "run"
        argv = [
            "demo",
            "--loss",
            loss,
            "--data",
            data,
            "--model",
            save_tiny(tmp_path),
            "--steps",
            "2",
            "--output_dir",
            str(out),
        ]
        monkeypatch.setattr(sys, "argv", argv)
        demo.main()
        assert is_png(out / "curves.png")
        assert (out / "adapter_model.safetensors").exists()
        figures = json.loads((out / "figures.json").read_text())
        before = {key: value["before"]["mean"] for key, value in figures["results"].items()}
        assert before["accuracy"] == 0.5
        assert before["logratio_chosen"] == before["logratio_rejected"] == 0.0
        constant = math.log(2) if loss in ("kldpo", "wdpo") else 2 * math.log(2)
        if loss == "wdpo":  # and its penalty
            assert before["loss"] > constant
        else:
            assert before["loss"] == pytest.approx(constant)
        assert figures["results"]["loss"]["change"]["mean"] == pytest.approx(
            figures["results"]["loss"]["after"]["mean"] - before["loss"]
        )
        assert figures["results"]["logratio_chosen"]["after"]["mean"] != 0
