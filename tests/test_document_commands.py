"""What the documents tell one to type exists, and each document says whether a test runs it."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest

from trl_rdro.cli import COMMANDS
from trl_rdro.cli.option_table import make_parser, read_table
from trl_rdro.errors import UserError

from .documents import DOCUMENTS, ROOT, blocks, commands


WITH_COMMANDS = [document for document in DOCUMENTS if commands(document)]
TRAINING = ("dpo", "kto", "iterate")


def name(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def known_options(command: str, argv: list[str]) -> set[str]:
    """Those that a command takes, of `accelerate launch` too where it starts one."""
    parsers = [] if command in TRAINING else [import_module(f"trl_rdro.cli.{command}").make_parser()]
    if command in (*TRAINING, "inspect", "estimate"):
        names = {of for row in read_table()["options"] for of in row["of"] if command not in TRAINING or command in of}
        parsers += [make_parser(of) for of in {*names, "launch"}]
    own = {"--config", "--help"} | ({"--json"} if command == "estimate" else set())
    return own.union(*(parser._option_string_actions for parser in parsers))


@pytest.mark.parametrize("document", WITH_COMMANDS, ids=name)
def test_commands_and_their_options_exist(document):
    for command, *argv in commands(document):
        if command.startswith("--"):
            assert command in ("--version", "--help")
            continue
        assert command in COMMANDS, command
        options = {word.partition("=")[0] for word in argv if word.startswith("--")}
        assert options <= known_options(command, argv), f"{command}: {options - known_options(command, argv)}"
        for word in argv:  # files of the repository
            if word.startswith(("recipes/", "scripts/", "trl_rdro/data/", "docs/")):
                assert (ROOT / word).exists() or "--output" in argv, word


@pytest.mark.parametrize("document", [document for document in DOCUMENTS if blocks(document, "python")], ids=name)
def test_programs_are_python_and_import_what_is_there(document):
    for block in blocks(document, "python"):
        if document.name == "CONTRIBUTING.md" and "lambda" in block or ": Loss" in block:
            continue  # lines of a table
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trl_rdro":
                module = import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_programs_of_the_repository_that_are_named_exist(document):
    for path in re.findall(r"(?<![\w/])(?:scripts|tests)/[\w/]+\.py", document.read_text()):
        assert (ROOT / path).exists() or document.name == "CHANGELOG.md", path
    for module in re.findall(r"python -m (tests[\w.]+)", document.read_text()):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def test_usage_errors_of_documents_would_be_found():
    with pytest.raises(UserError):
        make_parser("dpo").parse_args(["--nope"])
    assert "--nope" not in known_options("inspect", []) and "--row" in known_options("inspect", [])


def test_every_document_with_code_says_whether_it_is_run():
    text = (ROOT / "docs" / "README.md").read_text()
    for document in DOCUMENTS:
        if blocks(document, "bash", "console", "python") and document.name != "CHANGELOG.md":
            assert f"| {name(document)} |" in text, f"{name(document)} is not in scripts/doc_commands.py"
