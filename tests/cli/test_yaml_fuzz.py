"""YAML files drawn at random, through the commands' own loader and parser: settings, or one sentence; and no option
has a value that it cannot mean."""

import dataclasses
import json
import logging
import os
import warnings
from unittest import mock

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

from trl_rdro import DPOConfig, KTOConfig
from trl_rdro.cli import iterate, training_options
from trl_rdro.errors import UserError
from trl_rdro.iterate.config import IterateConfig
from trl_rdro.tools.yaml_files import read_yaml

from ..configs.test_fields import OF_ENGINES, is_wrong
from ..fuzz import VALUES, fuzz
from ..tiny import cpu_args


BASE = cpu_args(model_name_or_path="any", dataset_name="any", output_dir="out")
COMMANDS = {
    "dpo": (lambda argv: training_options.parse("dpo", argv)[0], BASE),
    "kto": (lambda argv: training_options.parse("kto", argv)[0], BASE),
    "iterate": (lambda argv: iterate.parse(argv)[0], {**BASE, "reward_funcs": ["tests.iterate.worker.vowels"]}),
}
CLASSES = {
    "dpo": (DPOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig),
    "kto": (KTOConfig, ModelConfig, ScriptArguments, DatasetMixtureConfig),
    "iterate": (DPOConfig, ModelConfig, ScriptArguments, IterateConfig),
}
NAMES = {
    command: sorted({field.name for cls in classes for field in dataclasses.fields(cls) if field.init})
    for command, classes in CLASSES.items()
}
# Read as another type than the annotation on purpose, or not by these commands
LOOSE = {"lora_target_modules", "datasets", "use_cpu", "bf16", "method", "accelerator_config"} | OF_ENGINES


@pytest.fixture(autouse=True, scope="module")
def quiet():
    logging.disable(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


def parsed(command: str, path) -> tuple | None:
    """What the command makes of a file; None for a refusal, which is one sentence."""
    with mock.patch.dict(os.environ):
        try:
            return COMMANDS[command][0](["--config", str(path)])
        except UserError as error:
            assert "\n" not in str(error) and str(error).strip()
            return None


# Texts

scalars = st.one_of(
    st.sampled_from(["1", "-1", ".nan", ".inf", "1e-3", "0x1F", "1_000", "true", "no", "~", "null", "''", "'a", "{}"]),
    st.sampled_from(
        ["[1, 2]", "[", "{a: 1}", "{a: 1, a: 2}", "2001-01-01", "12:30:45", "=", "<<", "%", "@x", "`", "|"]
    ),
    st.sampled_from(
        ["!!int x", "!!float 1", "!!python/name:os.system", "!!binary aGk=", "!!set {a}", "!x y", "!!str"]
    ),
    st.sampled_from(
        ["&a 1", "*a", "*b", "&a [*a]", "&a {b: *a}", ">\n  x\n  y", "|\n x", "'\u2028'", '"\\x00"', "\ufeff"]
    ),
    st.text(max_size=6),
)
keys = st.one_of(
    st.sampled_from(["beta", "learning_rate", "loss_type", "env", "num_processes", "datasets", "fsdp_config", "<<"]),
    st.sampled_from(["output_dir", "report_to", "1", "? a", "[a]", "~", "true", "beta ", "--beta", "nope", "config"]),
    st.text(max_size=4),
)
lines = st.one_of(
    st.tuples(keys, scalars).map(": ".join),
    st.tuples(keys, scalars).map(lambda pair: f"  {pair[0]}: {pair[1]}"),
    st.tuples(keys, scalars).map(lambda pair: f"{pair[0]}:\n  - {pair[1]}\n  - {pair[1]}"),
    st.tuples(keys, scalars).map(lambda pair: f"{pair[0]}: {pair[1]}\n{pair[0]}: {pair[1]}"),
    scalars.map("- {}".format),
    st.sampled_from(["---", "...", "%YAML 1.1", "# nothing", "\t", ""]),
)
texts = st.one_of(
    st.lists(lines, max_size=5).map("\n".join).map(lambda text: text.encode(errors="surrogatepass")),
    st.lists(lines, max_size=5).map("\n".join).map(lambda text: text.encode("utf-16", errors="surrogatepass")),
    st.recursive(
        VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ).map(lambda value: yaml.dump(value, allow_unicode=True).encode(errors="surrogatepass")),
    st.binary(max_size=40),
    st.tuples(st.binary(max_size=6), lines).map(lambda pair: pair[0] + pair[1].encode(errors="surrogatepass")),
)


@fuzz(500)
@given(text=texts, command=st.sampled_from(list(COMMANDS)))
def test_any_text_is_settings_or_a_sentence(text, command, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "drawn.yaml"
    path.write_bytes(text)
    parsed(command, path)
    try:
        settings = read_yaml(path)
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert all(isinstance(key, str) for key in settings)


# Options

options = st.sampled_from(list(COMMANDS)).flatmap(
    lambda command: st.tuples(
        st.just(command), st.dictionaries(st.sampled_from(NAMES[command]), VALUES, min_size=1, max_size=2)
    )
)


@fuzz(700)
@given(drawn=options)
def test_no_option_takes_a_value_that_it_cannot_mean(drawn, tmp_path_factory):
    command, given_options = drawn
    path = tmp_path_factory.getbasetemp() / "options.json"  # JSON is YAML, and has no other words for these values
    path.write_text(json.dumps({**COMMANDS[command][1], **given_options}))
    arguments = parsed(command, path)
    for value in arguments or ():
        for name in given_options.keys() - LOOSE:
            if hasattr(value, name):
                meant = getattr(value, name)
                assert not is_wrong(type(value), name, getattr(meant, "value", meant)) or meant is None, (name, meant)


def test_the_strategies_reach_both_ends(tmp_path):
    found = set()

    @fuzz(100)
    @given(options)
    def look(drawn):
        command, given_options = drawn
        path = tmp_path / "options.json"
        path.write_text(json.dumps({**COMMANDS[command][1], **given_options}))
        found.add(parsed(command, path) is None)

    look()
    assert found == {True, False}
