"""The documents lead somewhere: links, anchors, and an index that names every command and document."""

import re
from pathlib import Path

import pytest

from trl_rdro.cli import COMMANDS


ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "recipes").glob("*.md")})
INDEX = ROOT / "docs" / "README.md"
LINK = re.compile(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)")


def anchors(document: Path) -> set[str]:
    """Those of its headings, as repository hosts make them."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    for target, anchor in LINK.findall(document.read_text()):
        path = (document.parent / target).resolve() if target else document
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), f"{target}#{anchor}"


def test_the_index_has_every_document():
    missing = [path.name for path in (ROOT / "docs").glob("*.md") if f"]({path.name})" not in INDEX.read_text()]
    assert missing == [INDEX.name]


def test_the_index_leads_to_each_command():
    """It says that a command is the file of its name."""
    for name in COMMANDS:
        assert f"`{name}`" in INDEX.read_text(), f"{name} is not in docs/README.md"
        assert (ROOT / "trl_rdro" / "cli" / f"{name}.py").exists(), f"trl_rdro/cli/{name}.py"
