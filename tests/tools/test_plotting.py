"""The curves of a log: every point that was logged, and nothing else."""

import pytest

from trl_rdro.tools.plotting import plot_log_history, plot_run

from ..helpers import is_png


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
def test_writes_a_png(history, tmp_path):
    path = plot_log_history(history, tmp_path / "new folder" / "curves.png")
    assert path == tmp_path / "new folder" / "curves.png"
    assert is_png(path)


def test_every_logged_point_is_drawn(tmp_path, figures):
    plot_log_history({"a": HISTORY, "b": HISTORY[1:3]}, tmp_path / "curves.png")
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


def test_several_evaluation_sets_are_told_apart(tmp_path, figures):
    """By their names, which may hold anything; what only looks like a set's metric is none."""
    sets = {"eval_easy_": 1.3, "eval_hard_loss_": 1.4}
    history = [{"step": 1, "loss": 1.39}] + [
        {"step": 1, f"{prefix}loss": loss, f"{prefix}wdpo/gap": loss, f"{prefix}runtime": 0.1}
        for prefix, loss in sets.items()
    ]
    history.append({"step": 1, "eval_easy_aux_loss": 7.0})
    plot_run(history, tmp_path / "curves.png")
    drawn = {
        axes.get_title(): {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in figures[0].axes
    }
    assert drawn == {
        "loss": {"train": [[1, 1.39]], "held-out (easy)": [[1, 1.3]], "held-out (hard_loss)": [[1, 1.4]]},
        "wdpo: error of the central difference": {"held-out (easy)": [[1, 1.3]], "held-out (hard_loss)": [[1, 1.4]]},
    }
    assert len({line.get_marker() for line in figures[0].axes[0].lines}) == 3


def test_a_panel_without_data_says_so(tmp_path, figures):
    plot_log_history([{"step": 1, "loss": 1.4}], tmp_path / "curves.png")
    texts = [[text.get_text() for text in axes.texts] for axes in figures[0].axes]
    assert texts == [[], ["not logged"], ["not logged"]]
