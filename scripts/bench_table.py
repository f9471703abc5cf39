"""The report of `scripts/bench.py` in Markdown."""

from typing import Any


TITLES = {
    1: "The losses that need nothing but their formula, against TRL's",
    2: "kldpo with accumulation against DPO",
    3: "wdpo against DPO and against exact double backward",
    4: "Scaling: kldpo and wdpo beside DPO",
    5: "Around the loss",
    6: "The largest batch that fits (CUDA only)",
}
Row = dict[str, Any]


def verdict(value: float, goal: float | None) -> str:
    return "" if goal is None else "met" if value <= goal else "missed"


def limit(goal: float | None) -> str:
    return "" if goal is None else f"≤ {goal:.2f}"


def milliseconds(side: dict[str, Any]) -> str:
    return f"{side['ms']:.0f} ± {side['mad']:.0f}"


def comparison_table(rows: list[Row]) -> list[list[str]]:
    lines = [
        ["ours", "against", "ms", "ms", "time ratio", "goal", "", "MiB", "MiB", "memory ratio", "goal", "", "setting"]
    ]
    for row in rows:
        time, memory = row["time"], row["memory"]
        lines.append(
            [
                row["what"],
                row["against"],
                milliseconds(row["ours"]),
                milliseconds(row["theirs"]),
                f"{time['ratio']:.3f} ({time['low']:.3f} to {time['high']:.3f})",
                limit(time["goal"]),
                verdict(time["ratio"], time["goal"]),
                f"{row['ours']['bytes'] / 2**20:.0f}",
                f"{row['theirs']['bytes'] / 2**20:.0f}",
                f"{memory['ratio']:.3f}",
                limit(memory["goal"]),
                verdict(memory["ratio"], memory["goal"]),
                row["setting"],
            ]
        )
    return lines


def scaling_table(rows: list[Row]) -> list[list[str]]:
    lines = [["loss", "axis", "values", "ms", "exponent", "goal", "", "MiB", "exponent", "goal", ""]]
    for row in rows:
        line = [row["what"], row["axis"], " ".join(map(str, row["values"]))]
        for key, unit in (("seconds", 1e-3), ("bytes", 2**20)):
            exponent, goal = row["exponents"][key], row["goals"][key]
            line += [" ".join(f"{value / unit:.0f}" for value in row[key]), f"{exponent:.2f}"]
            line += [limit(goal), verdict(exponent, goal)] if row["what"] != "sigmoid" else ["", ""]
        lines.append(line)
    return lines


def overhead_table(rows: list[Row]) -> list[list[str]]:
    lines = [["", "TRL, s", "ours, s", "difference", "goal", ""]]
    for row in rows:
        more = row["ours"] - row["theirs"]
        figures = [f"{row['theirs']:.2f}", f"{row['ours']:.2f}", f"{more:+.2f}"]
        lines.append([row["what"], *figures, limit(row["goal"]), verdict(more, row["goal"])])
    return lines


def largest_table(rows: list[Row]) -> list[list[str]]:
    return [["loss", "setting", "pairs"], *([row["what"], row["setting"], str(row["pairs"])] for row in rows)]


TABLES = {4: scaling_table, 5: overhead_table, 6: largest_table}


def table(report: dict[str, Any]) -> str:
    """The whole report in Markdown."""
    versions = ", ".join(f"{name} {of}" for name, of in report["versions"].items())
    threads = f"{report['threads']} thread{'s' * (report['threads'] > 1)}"
    text = [f"{report['device']}, {threads}, {report['clock']} time; {versions}. {report['date']}:"]
    text += [f"`{report['command']}`"]
    for number, rows in sorted((int(key), rows) for key, rows in report["sections"].items() if rows):
        head, *lines = TABLES.get(number, comparison_table)(rows)
        text += ["", f"### {number}. {TITLES[number]}", ""]
        text += [f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines)]
    return "\n".join(text) + "\n"


def faster(row: Row) -> list[str]:
    """A cell of `scripts/bench_packed.py`."""
    processor, goal, memory = row["processor"], row["goal"], row.get("bytes")
    share = memory and memory[0] / memory[1]
    flops = row.get("flops", {})
    batch = f"{row['batch']} x {row['accumulation']}" if row["accumulation"] > 1 else str(row["batch"])
    against = {"stock": "sigmoid", "stock, one at a time": "sigmoid, one pair at a time"}.get(row["against"])
    against = f"{against}, grouped by length" if row["order"] == "grouped" else against or f"wdpo, {row['against']}"
    return [
        row["corpus"] if row["corpus"] != "filled" else "256 tokens each, vocabulary 150,000",
        batch,
        row["ours"],
        against,
        f"{processor['ratio']:.2f} ({processor['low']:.2f} to {processor['high']:.2f})",
        "" if goal is None else f"≥ {goal:.2f}",
        "" if goal is None else "met" if processor["ratio"] >= goal else "missed",
        f"{row['wall']['ratio']:.2f}",
        f"{share:.2f}, goal ≤ {row['memory_goal']:.2f}: {verdict(share, row['memory_goal'])}" if memory else "",
        *(f"{flops[key]:.2f}" if flops else "" for key in ("here", "Qwen2.5-7B")),
    ]


def packed_table(rows: list[Row]) -> str:
    """The cells of `scripts/bench_packed.py` in Markdown."""
    first = rows[0]
    versions = ", ".join(f"{name} {of}" for name, of in first["versions"].items())
    dates = ", ".join(dict.fromkeys(row["date"] for row in rows))
    head = ["pairs", "at a time", "ours", "against TRL's", "times as many pairs/s", "goal", "", "wall time", "memory"]
    head += ["operations here", "... of Qwen2.5-7B on a GPU"]
    lines = [head, ["---"] * len(head), *map(faster, rows)]
    text = [f"{first['device']}, {first['threads']} thread, processor time; {versions}. {dates}:"]
    text += [f"`{first['command']}`", "", *(f"| {' | '.join(line)} |" for line in lines)]
    return "\n".join(text) + "\n"
