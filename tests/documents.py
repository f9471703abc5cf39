"""The documents, and the blocks of code in them."""

import re
import shlex
from pathlib import Path


ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    {*ROOT.glob("*.md"), ROOT / "llms.txt", *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").glob("*.md")}
)


def blocks(document: Path, *languages: str) -> list[str]:
    """The code between fences with one of these languages."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [text for language, text in found if language in languages]


def commands(document: Path) -> list[list[str]]:
    """The words of each `trl-rdro ...` in its blocks of shell code, less the name of the program and variables."""
    found = []
    for block in blocks(document, "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            match = re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*trl-rdro (?!.*\.\.\.)(.*)", line)
            if match:
                found.append(shlex.split(match[1], comments=True))
    return found
