"""Hooks of mkdocs: links that leave docs/ lead to the repository, whose address is read from pyproject.toml."""

import posixpath
import re
import tomllib
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]*)(#[^)]*)?\)")


def on_config(config):
    """Show where the repository is."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.repo_url, config.repo_name = project["urls"]["Repository"], project["name"]
    return config


def on_page_markdown(markdown, page, config, files):
    """Point links to files that are no pages at the repository's."""

    def lead(match: re.Match) -> str:
        target, anchor = match[1], match[2] or ""
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), target))
        file = files.get_file_from_path(posixpath.relpath(path, "docs"))
        if (file is not None and file.inclusion.is_included()) or not (ROOT / path).exists():
            return match[0]  # the latter for mkdocs to complain of
        return f"]({config.repo_url}/blob/HEAD/{path}{anchor})"

    return LINK.sub(lead, markdown)
