"""The report of `scripts/bench.py` in Markdown."""

from typing import Any


TITLES = {
    1: "The losses that need nothing but their formula, against TRL's",
    2: "kldpo with accumulation against DPO: one more gradient-free forward per micro-batch",
    3: "wdpo against DPO and against exact double backward",
    4: "Scaling: kldpo and wdpo beside DPO",
    5: "Around the loss",
    6: "The largest batch that fits (CUDA only)",
    7: "Packed rows and shared prompts on pairs of real and realistic lengths, against stock TRL",
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


def lengths_table(rows: list[Row]) -> list[list[str]]:
    """Beside the comparison, the tokens that are forwarded as a share of stock's padded positions."""
    head, *lines = comparison_table(rows)
    shares = [" / ".join(f"{row['tokens'][key]:.2f}" for key in ("packed", "shared")) for row in rows]
    return [[*head, "tokens packed / shared"], *([*line, share] for line, share in zip(lines, shares, strict=True))]


TABLES = {4: scaling_table, 5: overhead_table, 6: largest_table, 7: lengths_table}


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
