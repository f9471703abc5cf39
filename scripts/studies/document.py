"""
Write the committed results of the studies into docs/studies.md, between its markers.

    python scripts/studies/document.py
"""

import json
import re
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "studies.md"
RESULTS = DOCUMENT.parent / "results" / "studies"


def block(name: str) -> str:
    """The command, where and when it ran, the table and the figure of a study."""
    summary = json.loads((RESULTS / name / "summary.json").read_text())
    seeds = sorted({cell["seeds"] for cell in summary["cells"]})
    runs = sum(cell["seeds"] for cell in summary["cells"])
    versions = ", ".join(f"{module} {version}" for module, version in summary["versions"].items())
    return "\n".join(
        [
            "```bash",
            summary["command"],
            "```",
            "",
            f"{summary['hardware']}; {summary['date']}; {' or '.join(map(str, seeds))} seeds, {runs} runs, "
            f"{summary['cell_seconds'] / 60:.0f} minutes in all beside other jobs; {versions}. Figures are means over "
            "the seeds ± their standard error.",
            "",
            (RESULTS / name / "table.md").read_text().strip(),
            "",
            f"![{name.replace('_', ' ')}](results/studies/{name}/figure.png)",
        ]
    )


def with_results(document: str) -> str:
    def replaced(match: re.Match) -> str:
        name = match[1]
        return f"<!-- {name} -->\n{block(name)}\n<!-- /{name} -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- /\1 -->", replaced, document, flags=re.DOTALL)


if __name__ == "__main__":
    DOCUMENT.write_text(with_results(DOCUMENT.read_text()))
