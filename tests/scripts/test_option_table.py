"""The table of options refuses nothing that the parsers take, and needs nothing slow."""

import itertools
import subprocess
import sys

import option_table as written
import pytest

from trl_rdro.cli import option_table
from trl_rdro.errors import UserError


GIVEN = ["--model_name_or_path", "any", "--dataset_name", "any"]
HEAVY = {"torch", "transformers", "trl", "accelerate", "datasets"}

same_releases = pytest.mark.skipif(
    option_table.read_table()["versions"] != option_table.installed_versions(),
    reason="the table is of other releases, with which it is not believed",
)


def refuses(parser, argv) -> bool:
    """Whether it does not take the option, or says that it does not know it."""
    try:
        return argv[0] in parser.parse_known_args(argv)[1]
    except UserError:
        return True


@same_releases
@pytest.mark.parametrize("name", written.parsers())
def test_every_option_is_taken_as_its_parser_takes_it(name):
    real, ours = written.parsers()[name], option_table.make_parser(name)
    after = [] if name != option_table.LAUNCH else ["script"]
    values = (
        [],
        ["1"],
        ["-1"],
        ["-1e-5"],
        ["0.5"],
        ["1e-3"],
        ["nan"],
        ["no"],
        ["text"],
        ["[1]"],
        ["1", "2"],
        ["=", "x"],
    )
    for action in real._actions:
        choices = [[str(choice)] for choice in action.choices or []]
        for flag, value in itertools.product(action.option_strings, [*values, *choices]):
            if flag in ("-h", "--help"):
                continue
            argv = [flag, *value, *after]
            outcomes = [refuses(parser, argv) for parser in (real, ours)]
            assert outcomes[0] or not outcomes[1], f"{argv} is refused, and the parser takes it"
            # A value that the parser converts by a function of its own is left to it
            if action.type in (None, str, int, float) and outcomes[0]:
                assert outcomes[1], f"{argv} is not refused at once"


MISTAKES = {
    "nothing given": ([], "no model given"),
    "no data": (["--model_name_or_path", "any"], "no dataset given"),
    "unknown": ([*GIVEN, "--nope", "1"], "unknown option --nope"),
    "misspelt": ([*GIVEN, "--learning_rat=1"], "did you mean --learning_rate"),
    "text for a number": ([*GIVEN, "--learning_rate", "fast"], "fast"),
    "none of the choices": ([*GIVEN, "--optim", "nope"], "nope"),
    "no value": ([*GIVEN, "--learning_rate"], "expected one argument"),
    "a stray argument": (["mine.yaml", *GIVEN], "mine.yaml"),
    "text for a launch option": ([*GIVEN, "--num_processes", "two"], "two"),
    "no such file": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "a loss that nobody has": ([*GIVEN, "--loss_type", "rdroo"], "Did you mean 'rdro'?"),
    "a loss of pairs": ([*GIVEN, "--loss_type", "kldpo"], "needs pairs (prompt, chosen, rejected): use `DPOTrainer`"),
    "an option of pairs": ([*GIVEN, "--loss_weights", "1"], "it is one of `trl-rdro dpo`"),
    "a loss of labels": ([*GIVEN, "--loss_type", "kto"], "needs labelled completions"),
    "an option of labels": ([*GIVEN, "--desirable_weight", "1"], "it is one of `trl-rdro kto`"),
}
ONLY_OF = {"pairs": "kto", "labels": "dpo"}


@same_releases
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_refused_at_once(mistake):
    argv, words = MISTAKES[mistake]
    commands = [ONLY_OF[mistake.split()[-1]]] if mistake.split()[-1] in ONLY_OF else ["dpo", "kto", "iterate"]
    for command in commands:
        if mistake == "no data" and command == "iterate":
            continue  # whose prompts it asks for itself
        with pytest.raises(UserError) as refusal:
            option_table.refuse_at_once(command, argv)
        assert words in str(refusal.value)


@same_releases
def test_mistakes_in_a_yaml_file_are_refused_at_once(tmp_path):
    for text, words in (("bta: 1", "did you mean --beta"), ("loss_type: [rdro, kldpoo]", "Did you mean 'kldpo'")):
        (tmp_path / "mine.yaml").write_text(f"model_name_or_path: any\ndataset_name: any\n{text}\n")
        with pytest.raises(UserError, match=words):
            option_table.refuse_at_once("dpo", ["--config", str(tmp_path / "mine.yaml")])


def test_what_is_right_is_left_to_the_command():
    option_table.refuse_at_once("kto", [*GIVEN, "--loss_type", "rdro", "--num_processes", "2", "--beta", "0.1"])
    option_table.refuse_at_once("dpo", ["--help"])
    option_table.refuse_at_once("score", ["--nope"])


def test_with_other_releases_the_parsers_decide(monkeypatch):
    monkeypatch.setattr(option_table, "installed_versions", lambda: {"trl": "9"})
    option_table.refuse_at_once("dpo", ["--an_option_of_theirs", "1"])


@same_releases
def test_nothing_slow_is_imported():
    commands = [[command, *argv] for command, argv in itertools.product(("dpo", "kto", "iterate"), ([], ["--nope"]))]
    code = (
        f"import sys; from trl_rdro.cli import main; codes = [main(argv) for argv in {commands}]; "
        f"sys.exit(codes != [2] * {len(commands)} or bool({HEAVY} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
