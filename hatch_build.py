"""The package's description for package indexes: README.md, its relative links made absolute."""

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


# A label may be an image of somewhere else: a badge
LINK = re.compile(r"(!?)(\[(?:!\[[^\]]*\]\([^)]*\)|[^\]])*\])\((?!https?://|#)([^)]+)\)")


def absolute_links(text: str, repository: str) -> str:
    """Point relative links of a Markdown text to the repository's pages, and images to the files themselves."""

    def absolute(match: re.Match) -> str:
        image, label, target = match.groups()
        return f"{image}{label}({repository}/{'raw' if image else 'blob'}/HEAD/{target})"

    return LINK.sub(absolute, text)


class ReadmeHook(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        text = Path(self.root, "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {
            "content-type": "text/markdown",
            "text": absolute_links(text, metadata["urls"]["Repository"]),
        }
