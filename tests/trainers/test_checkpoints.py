"""What is saved, what is resumed from, and what is refused, in this process. Killed ones are in test_interruptions."""

import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import struct
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_rdro import DPOTrainer, KTOTrainer
from trl_rdro.run.completeness import fault, is_complete, last_complete_checkpoint
from trl_rdro.run.disk import DiskFull
from trl_rdro.trainers import checkpoints
from trl_rdro.trainers.checkpoints import non_finite_parameters

from ..helpers import hold, spoil
from ..tiny import save_tiny, tiny_preferences, tiny_qwen2, tiny_tokenizer
from ..training import lora, make_trainer, parameters, same_parameters, trained_parameters


def make(model, output_dir, trainer_class=DPOTrainer, trainer_kwargs=None, **settings):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **settings}
    kwargs = {"train_dataset": tiny_preferences(16), **(trainer_kwargs or {})}
    return make_trainer(model, output_dir, trainer_class, kwargs, **settings)


# Complete or not


@pytest.fixture(scope="module")
def saved(qwen2, tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of each layout that one process can write, and likenesses of the others."""
    root = tmp_path_factory.mktemp("saved")
    kwargs = {"peft_config": lora()}
    make(qwen2, root / "full", max_steps=1).train()
    make(qwen2, root / "adapter", max_steps=1, trainer_kwargs=kwargs).train()
    found = {name: root / name / "checkpoint-1" for name in ("full", "adapter")}

    def alike(name: str, *without: str) -> Path:
        # As if TRL had written it: no manifest
        found[name] = root / name / "checkpoint-1"
        shutil.copytree(found["full"], found[name])
        for left_out in ("manifest.json", "run_settings.json", *without):
            (found[name] / left_out).unlink()
        return found[name]

    alike("trl's")
    sharded = alike("sharded", "model.safetensors")
    for i in (1, 2):
        shutil.copy(found["full"] / "model.safetensors", sharded / f"model-0000{i}-of-00002.safetensors")
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (sharded / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    deepspeed = alike("deepspeed", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
    (deepspeed / "latest").write_text("global_step1")
    (deepspeed / "global_step1").mkdir()
    for rank in range(2):
        torch.save({"a": 1}, deepspeed / "global_step1" / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
        torch.save({"a": 1}, deepspeed / "global_step1" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    ranks = alike("ranks", "rng_state.pth")
    fsdp = alike("fsdp", "model.safetensors", "optimizer.pt")
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / name).mkdir()
        (fsdp / name / ".metadata").write_bytes(b"metadata")
        (fsdp / name / "__0_0.distcp").write_bytes(b"shard")
    for folder, rank in itertools.product((deepspeed, ranks), range(2)):
        torch.save({"cpu": torch.zeros(8)}, folder / f"rng_state_{rank}.pth")
    return found


LAYOUTS = ("full", "adapter", "trl's", "sharded", "deepspeed", "ranks", "fsdp")
# Of these the absence shows without a manifest too
NEEDED = {
    "full": ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"],
    "adapter": ["adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
    "trl's": ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"],
    "sharded": ["model-00002-of-00002.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"],
    "deepspeed": ["global_step1/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "rng_state_0.pth"],
    "ranks": ["rng_state_0.pth", "optimizer.pt", "model.safetensors"],
    "fsdp": ["pytorch_model_fsdp_0/.metadata", "optimizer_0/.metadata", "scheduler.pt", "rng_state.pth"],
}


def halved(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def one_byte_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def zeroed(path: Path) -> None:
    """What a power cut leaves of a file whose pages never reached the disk."""
    path.write_bytes(bytes(path.stat().st_size))


def noise(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def a_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = (Path.unlink, halved, one_byte_short, emptied, zeroed, noise, a_directory)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_complete_with_all_its_parts_and_not_without_any(saved, tmp_path, layout):
    assert fault(saved[layout]) is None
    for i, (name, damage) in enumerate(itertools.product(NEEDED[layout], DAMAGES)):
        if name.endswith(".metadata") and damage in (halved, one_byte_short, zeroed, noise):
            continue  # of no format that can be checked without the manifest
        if name == "trainer_state.json" and damage is one_byte_short:
            continue  # the line's end
        copy = tmp_path / str(i)
        shutil.copytree(saved[layout], copy)
        damage(copy / name)
        assert fault(copy), (name, damage.__name__)
        shutil.rmtree(copy)


@pytest.mark.parametrize("layout", ["full", "adapter"])
def test_a_single_changed_byte_of_a_small_checkpoint_shows(saved, tmp_path, layout):
    manifest = json.loads((saved[layout] / "manifest.json").read_text())
    assert set(NEEDED[layout]) - {"trainer_state.json"} <= manifest.keys() and "training_args.bin" not in manifest
    for name, entry in manifest.items():
        for position in (0, entry["bytes"] // 2, entry["bytes"] - 1):
            copy = tmp_path / "copy"
            shutil.copytree(saved[layout], copy)
            with open(copy / name, "r+b") as file:
                file.seek(position)
                byte = file.read(1)
                file.seek(position)
                file.write(bytes([byte[0] ^ 1]))
            assert fault(copy), (name, position)
            shutil.rmtree(copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b"null",
        b'{"global_step": "3"}',
        b'{"global_step": null}',
        b"\xff\xfe\x00\x80",
        b"[" * 9999,
    ],
)
def test_no_state_can_make_it_raise(saved, tmp_path, content):
    copy = tmp_path / "checkpoint-1"
    shutil.copytree(saved["full"], copy)
    (copy / "trainer_state.json").write_bytes(content)
    assert fault(copy) and not is_complete(copy) and last_complete_checkpoint(tmp_path) is None


def test_nothing_else_can_make_it_raise(saved, tmp_path):
    assert (
        fault(tmp_path / "nowhere")
        and fault(tmp_path / "\0")
        and last_complete_checkpoint(tmp_path / "nowhere") is None
    )
    header = b'{"a": {"data_offsets": 7}}'
    for content in (struct.pack("<Q", 2**63), struct.pack("<Q", len(header)) + header, b"PK\x05\x06" + bytes(18)):
        for name in ("model.safetensors", "optimizer.pt", "manifest.json", "trainer_state.json"):
            copy = tmp_path / "copy"
            shutil.copytree(saved["full"], copy)
            (copy / name).write_bytes(content)
            assert fault(copy), (content, name)
            shutil.rmtree(copy)


def test_a_checkpoint_of_weights_only_is_not_complete(qwen2, tmp_path, messages):
    make(qwen2, tmp_path, save_only_model=True).train()
    trainer = make(qwen2, tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-3'` is not a complete checkpoint: .*optimizer.pt\) is missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    trainer.train(resume_from_checkpoint=True)
    assert sum("is passed over" in line for line in messages()) == 3
    assert any("starting from the beginning" in line for line in messages())


@pytest.mark.parametrize("trainer_class", [DPOTrainer, KTOTrainer])
def test_a_damaged_newest_checkpoint_is_passed_over(qwen2, tmp_path, messages, trainer_class):
    """However it is damaged: the older one is taken, and the run ends as it would have."""
    whole = make(qwen2, tmp_path / "whole", trainer_class)
    whole.train(resume_from_checkpoint=True)
    expected = whole.model.state_dict()
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json"):
        broken = tmp_path / name
        shutil.copytree(tmp_path / "whole", broken)
        halved(broken / "checkpoint-3" / name)
        (broken / "checkpoint-2" / name).unlink()
        resumed = make(qwen2, broken, trainer_class)
        resumed.train(resume_from_checkpoint=True)
        assert resumed._resumed_from == str(broken / "checkpoint-1")
        lines = [line for line in messages() if str(broken) in line and "is not complete and is passed over" in line]
        assert len(lines) == 2 and all(name in line for line in lines)
        assert all(torch.equal(value, resumed.model.state_dict()[key]) for key, value in expected.items())


def test_a_checkpoint_that_is_written_over_is_incomplete_meanwhile(qwen2, tmp_path):
    """A run that starts again over the checkpoints of an earlier one must not leave a mixture that looks complete."""
    make(qwen2, tmp_path, max_steps=1).train()
    again, seen = make(qwen2, tmp_path, max_steps=1), []
    save_optimizer = again._save_optimizer_and_scheduler
    again._save_optimizer_and_scheduler = lambda path: (seen.append(is_complete(path)), save_optimizer(path))
    again.train()
    assert seen == [False] and is_complete(tmp_path / "checkpoint-1")


def test_all_is_on_the_disk_before_the_mark_and_the_mark_before_older_ones_go(qwen2, tmp_path, monkeypatch):
    events, fsync, rotate = [], os.fsync, checkpoints.rotate_checkpoints

    def record(descriptor):
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(
        checkpoints, "rotate_checkpoints", lambda **kwargs: (events.append("rotate"), rotate(**kwargs))
    )
    trainer = make(qwen2, tmp_path, max_steps=2, save_total_limit=1)
    marked = []
    save_state = trainer.state.__class__.save_to_json
    monkeypatch.setattr(
        trainer.state.__class__,
        "save_to_json",
        lambda self, path: (marked.append(len(events)), save_state(self, path)),
    )
    trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    second = tmp_path / "checkpoint-2"
    before, after = events[marked[0] : marked[1]], events[marked[1] :]
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert second / name in before
    assert second in before and tmp_path in before, "the names, too"
    assert second / "trainer_state.json" in after[: after.index("rotate")]


# The run it was begun as


def test_another_run_is_refused_before_a_model_is_loaded(qwen2, tmp_path, messages):
    make(qwen2, tmp_path, loss_type="kldpo").train()
    other = {"train_dataset": tiny_preferences(16, seed=1)}
    changes = [
        ({"loss_type": "wdpo"}, {}, r"`loss_type` \['kldpo'\] \(now \['wdpo'\]\)"),
        ({"kldpo_tau": 2.0}, {}, r"`kldpo_tau` 1.0 \(now 2.0\)"),
        ({"seed": 3}, {}, r"`seed` 42 \(now 3\)"),
        ({"per_device_train_batch_size": 2}, {}, r"`per_device_train_batch_size` 8 \(now 2\)"),
        (
            {"gradient_accumulation_steps": 2, "learning_rate": 1e-5},
            {},
            r"`learning_rate` 0.001 .*`gradient_accumulation",
        ),
        ({}, other, r"`data` '16 rows of chosen, prompt, rejected, \w+' \(now "),
        ({}, {"peft_config": lora()}, r"`adapter.\w+` None"),
        ({}, {"ref_model": tiny_qwen2(seed=2)}, r"`ref_model` None"),
    ]
    for settings, kwargs, sentence in changes:
        settings = {"loss_type": "kldpo", **settings}
        with pytest.raises(ValueError, match=f"checkpoint-3 was begun with .*{sentence}.*`resume_with_changes=True`"):
            make(qwen2, tmp_path, trainer_kwargs=kwargs, resume_from_checkpoint="true", **settings)
        trainer = make(qwen2, tmp_path, trainer_kwargs=kwargs, **settings)
        with pytest.raises(ValueError, match=sentence):
            trainer.train(resume_from_checkpoint=True)
    other_model = save_tiny(tmp_path / "other", seed=1)
    with pytest.raises(ValueError, match="`model` 'qwen2 .*now 'qwen2 "):
        make(other_model, tmp_path, loss_type="kldpo", resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    # The same run, with other habits
    same = make(qwen2, tmp_path, loss_type="kldpo", resume_from_checkpoint="true", logging_steps=7, save_steps=2)
    same.train(resume_from_checkpoint=True)
    assert same._resumed_from == str(tmp_path / "checkpoint-3")


def test_a_change_can_be_accepted(qwen2, tmp_path, messages):
    make(qwen2, tmp_path, loss_type="kldpo").train()
    settings = {"loss_type": "wdpo", "max_steps": 5, "resume_with_changes": True, "resume_from_checkpoint": "true"}
    trainer = make(qwen2, tmp_path, **settings)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 5 and is_complete(tmp_path / "checkpoint-5")
    assert any("goes on as `resume_with_changes=True` says" in line for line in messages())
    begun = json.loads((tmp_path / "checkpoint-5" / "run_settings.json").read_text())
    assert begun["loss_type"] == ["wdpo"]
    assert json.loads((tmp_path / "run_settings.json").read_text()) == begun


def test_our_unpaired_losses_are_known_by_their_name(qwen2, tmp_path):
    make(qwen2, tmp_path, KTOTrainer, loss_type="rdro", max_steps=1).train()
    assert json.loads((tmp_path / "checkpoint-1" / "run_settings.json").read_text())["loss_type"] == "rdro"
    with pytest.raises(ValueError, match=r"`loss_type` 'rdro' \(now 'ddro'\)"):
        settings = {"loss_type": "ddro", "max_steps": 1, "resume_from_checkpoint": "true"}
        make(qwen2, tmp_path, KTOTrainer, **settings)


def test_the_same_objects_make_the_same_run_again(qwen2, tmp_path):
    """PEFT writes the modules that it found into the given configuration."""
    peft_config = lora()
    for _ in range(2):
        trainer = make(qwen2, tmp_path, max_steps=1, trainer_kwargs={"peft_config": peft_config})
        trainer.train(resume_from_checkpoint=True)
    assert trainer._resumed_from is not None and peft_config.target_modules == "all-linear"


def test_a_checkpoint_of_an_older_version_is_taken_as_it_is(qwen2, tmp_path):
    make(qwen2, tmp_path, max_steps=1).train()
    for name in ("manifest.json", "run_settings.json"):
        (tmp_path / "checkpoint-1" / name).unlink()
    trainer = make(qwen2, tmp_path, max_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._resumed_from == str(tmp_path / "checkpoint-1")


def test_two_runs_into_one_directory(qwen2, tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path), ready, "alone"))
    holder.start()
    assert ready.wait(30)
    trainer = make(qwen2, tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=rf"Another run is writing to .* \(process {holder.pid} on "):
        trainer.train()
    assert trainer.state.global_step == 0 and not (tmp_path / "run_settings.json").exists()
    holder.kill()
    holder.join()
    trainer.train()
    trainer.train()


# Parameters that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("loss_type", ["sigmoid", "rdro"])
def test_parameters_that_are_not_finite_are_not_saved(qwen2, tmp_path, loss_type, value):
    trainer = make(qwen2, tmp_path, loss_type=loss_type)
    step = trainer.training_step

    def break_after(*args, **kwargs):
        loss = step(*args, **kwargs)
        if trainer.state.global_step == 1:
            with torch.no_grad():
                # Where no loss shows it: a token that does not occur
                trainer.model.get_input_embeddings().weight[-1, 0] = value
        return loss

    trainer.training_step = break_after
    sentence = "not finite at step 2 .model.embed_tokens.weight.* and are not saved: .*goes on from .*checkpoint-1"
    with pytest.raises(FloatingPointError, match=sentence):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


@pytest.mark.parametrize("loss_type", ["sigmoid", "rdro"])
def test_nor_after_the_last_step(qwen2, tmp_path, loss_type):
    """What it does to the parameters is in no loss. Adam without its epsilon divides 0 by 0 where a token does not
    occur."""
    settings = {"save_strategy": "no", "loss_type": loss_type, "adam_epsilon": 0.0, "max_steps": 1}
    trainer = make(qwen2, tmp_path, **settings)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[0]["loss"]) and non_finite_parameters(trainer.model)
    with pytest.raises(FloatingPointError, match="not finite at step 1 .* and are not saved: there is no complete"):
        trainer.save_model()
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_checkpoint_with_parameters_that_are_not_finite_is_named(qwen2, tmp_path):
    trainer = make(qwen2, tmp_path)
    trainer.train()
    spoil(tmp_path / "checkpoint-2")
    with pytest.raises(FloatingPointError, match=r"parameters in .*checkpoint-2 are not finite \(.* and \d+ more\)"):
        make(qwen2, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("trainer_class", "settings", "adapter"),
    [
        (DPOTrainer, {"loss_type": "sigmoid"}, None),
        (DPOTrainer, {"loss_type": "kldpo", "gradient_accumulation_steps": 2}, None),
        (DPOTrainer, {"loss_type": "repo"}, lora(lora_dropout=0.1)),
        (KTOTrainer, {"loss_type": "rdro"}, None),
    ],
    ids=["sigmoid", "kldpo", "repo with LoRA", "unpaired rdro"],
)
def test_one_that_is_not_finite_is_passed_over(trainer_class, settings, adapter, qwen2, tmp_path, messages):
    """For the next older one that is, from which the run ends with the weights of an unbroken one."""
    kwargs = {"trainer_kwargs": {"peft_config": adapter} if adapter else {}, "max_steps": 4, **settings}
    whole = trained_parameters(make(qwen2, tmp_path / "whole", trainer_class, **kwargs))
    make(qwen2, tmp_path / "broken", trainer_class, **kwargs).train()
    for step in (4, 3, 2):
        spoil(tmp_path / "broken" / f"checkpoint-{step}")
    trainer = make(qwen2, tmp_path / "broken", trainer_class, **kwargs)
    messages()
    trainer.train(resume_from_checkpoint=True)
    passed_over = [line for line in messages() if "It is passed over" in line]
    assert len(passed_over) == 3 and "checkpoint-4 are not finite" in passed_over[0]
    assert "resuming from" in passed_over[2] and "checkpoint-1" in passed_over[2]
    assert same_parameters(whole, parameters(trainer))


def test_with_no_finite_one_the_run_does_not_begin(qwen2, tmp_path):
    make(qwen2, tmp_path, max_steps=2).train()
    for step in (1, 2):
        spoil(tmp_path / f"checkpoint-{step}")
    with pytest.raises(FloatingPointError, match="checkpoint-1 are not finite"):
        make(qwen2, tmp_path, max_steps=2).train(resume_from_checkpoint=True)


def test_only_trained_parameters_are_looked_at():
    model = tiny_qwen2()
    assert non_finite_parameters(model) == []
    with torch.no_grad():
        model.model.norm.weight[3] = math.nan
        model.lm_head.weight[0, 0] = math.inf
    assert non_finite_parameters(model) == ["model.norm.weight", "lm_head.weight"]
    model.model.norm.weight.requires_grad_(False)
    assert non_finite_parameters(model) == ["lm_head.weight"]
    assert non_finite_parameters(model.requires_grad_(False)) == []


# The disk, and tokens


def test_a_full_disk_leaves_the_previous_checkpoint(qwen2, tmp_path):
    trainer = make(qwen2, tmp_path, save_total_limit=1)
    save, limits = trainer._save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

    def save_without_room(*args):
        if trainer.state.global_step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    trainer._save_checkpoint = save_without_room
    sentence = "^No room on the disk for .*checkpoint-2. Make room: the same command .* goes on from .*checkpoint-1.$"
    with pytest.raises(DiskFull, match=sentence):
        trainer.train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    whole, resumed = make(qwen2, tmp_path / "whole"), make(qwen2, tmp_path, save_total_limit=1)
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed._resumed_from == str(tmp_path / "checkpoint-1")
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_no_token_is_in_any_file(qwen2, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(qwen2)
    kwargs = {"processing_class": tiny_tokenizer()}
    trainer = make(model, tmp_path, hub_token="hf_SECRET", max_steps=1, trainer_kwargs=kwargs)
    trainer.args.model_init_kwargs = {"token": "hf_SECRET"}
    trainer.train()
    trainer.save_state()
    trainer.save_model()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"training_args.bin", "run_settings.json"} <= {path.name for path in files}
    assert [path for path in files if b"hf_SECRET" in path.read_bytes()] == []
    assert trainer.args.hub_token == "hf_SECRET"
