"""
What becomes of thumbs-up data with hard and easy prompts: one share of preferred answers for all, or each prompt's?

A tiny Qwen2 answers a few prompts with one of 14 words; the reference model has exactly the distribution from which
the labelled answers were drawn, so that all that ddro and rdro assume holds for each prompt. What differs between
prompts is the share alpha(x) of answers that people like. With one alpha for all the losses ask for a total mass of
alpha(x)/alpha on the answers of prompt x. Measured: the mass that the policy leaves on them, and its KL(p+ || policy).

    python scripts/studies/prompt_shares.py --size small
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import study
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_rdro import KTOConfig, KTOTrainer


ANSWERS = [f"answer{i}" for i in range(14)]
UNRATED = [f"unrated{i}" for i in range(6)]  # what the model could say too, with one thousandth of its mass
ELSEWHERE = 1e-3
MANY = "0.05 0.12 0.25 0.4 0.6 0.8"
SHARES = {"ci": "0.12 0.4 0.8", "small": MANY, "full": MANY}
LABELS = 2000  # of each prompt
BATCH = 256
METHODS = {
    "rdro, one alpha": {"loss_type": "rdro"},
    "rdro, alpha(x)": {"loss_type": "rdro"},
    "ddro, one t": {"loss_type": "ddro", "ddro_cap": 0.999},
    "ddro, t(x)": {"loss_type": "ddro", "ddro_cap": 0.999},
    "kto": {"loss_type": "kto"},
}


def cells(size: str) -> list[dict[str, Any]]:
    methods = [name for name in METHODS if size != "ci" or name not in ("ddro, one t", "kto")]
    steps, seeds = {"ci": (300, 1), "small": (500, 3), "full": (2000, 5)}[size]
    common = {"shares": SHARES[size], "steps": steps}
    return [{"method": method, **common, "seed": seed} for seed in range(seeds) for method in methods]


def shares_of(cell: dict[str, Any]) -> list[float]:
    return [float(share) for share in cell["shares"].split()]


class Prompts:
    """
    Attributes:
        counts: how often each answer of each prompt was liked, and not, `(prompts, 14)` twice.
        mixture, p_plus: of the answers, `(prompts, 14)`.
    """

    def __init__(self, shares: list[float]):
        rng = np.random.default_rng(1)
        base = np.exp(rng.normal(size=(len(shares), len(ANSWERS))))
        base /= base.sum(axis=1, keepdims=True)
        appeal = 2 * rng.normal(size=base.shape)
        goal = np.array(shares)[:, None]
        for _ in range(200):  # shift what is liked until each prompt has its share
            liked = 1 / (1 + np.exp(-appeal))
            now = (base * liked).sum(axis=1, keepdims=True)
            appeal = appeal + (np.log(goal / (1 - goal)) - np.log(now / (1 - now))) / 2
        self.liked = np.maximum(1, np.round(LABELS * base * liked)).astype(int)
        self.others = np.maximum(1, np.round(LABELS * base * (1 - liked))).astype(int)
        total = self.liked + self.others
        self.mixture = total / total.sum(axis=1, keepdims=True)
        self.p_plus = self.liked / self.liked.sum(axis=1, keepdims=True)
        self.shares = self.liked.sum(axis=1) / total.sum(axis=1)
        self.share = self.liked.sum() / total.sum()

    def dataset(self, with_shares: bool) -> Dataset:
        rows = [
            {"prompt": f"prompt{i}", "completion": f" {answer}", "label": label, "preferred_fraction": share}
            for label, counts in ((True, self.liked), (False, self.others))
            for i, share in enumerate(self.shares.tolist())
            for answer, count in zip(ANSWERS, counts[i], strict=True)
            for _ in range(count)
        ]
        dataset = Dataset.from_list(rows)
        return dataset if with_shares else dataset.remove_columns("preferred_fraction")


def vocabulary(prompts: int) -> dict[str, int]:
    words = ["<pad>", "<eos>", *(f"prompt{i}" for i in range(prompts)), *ANSWERS, *UNRATED]
    return {word: i for i, word in enumerate(words)}


def tokenizer(prompts: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel(vocabulary(prompts), unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def exact_model(mixture: np.ndarray) -> Qwen2ForCausalLM:
    """A Qwen2 that answers each prompt by its row of `mixture`, then ends; see `language.exact_model`."""
    prompts, words = len(mixture), vocabulary(len(mixture))
    config = Qwen2Config(
        vocab_size=len(words),
        hidden_size=2 * (prompts + 1),
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        eos_token_id=words["<eos>"],
        pad_token_id=words["<pad>"],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config)
    answers, unrated = words[ANSWERS[0]], words[UNRATED[0]]
    logits = torch.full((prompts + 1, len(words)), -30.0, dtype=torch.float64)
    logits[:prompts, answers:unrated] = torch.tensor((1 - ELSEWHERE) * mixture).log()
    logits[:prompts, unrated:] = np.log(ELSEWHERE / len(UNRATED))
    logits[prompts, words["<eos>"]] = 0.0
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.zero_()
        embedding[2 : 2 + prompts, :prompts] = torch.eye(prompts)
        embedding[answers:, prompts] = 1.0
        head.zero_()
        head[:, : prompts + 1] = logits.T / config.hidden_size**0.5
    return model


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, data: Prompts) -> dict[str, list[float]]:
    """Of each prompt the mass on all its answers, and KL(p+ || policy) over whole completions."""
    model.eval()
    words = vocabulary(len(data.shares))
    masses, divergences = [], []
    for i, p_plus in enumerate(data.p_plus):
        rows = torch.tensor([[words[f"prompt{i}"], words[answer], words["<eos>"]] for answer in ANSWERS])
        log_probs = model(input_ids=rows).logits[:, :-1].double().log_softmax(dim=-1)
        policy = log_probs.gather(2, rows[:, 1:].unsqueeze(2)).sum(dim=(1, 2)).numpy()
        masses.append(float(np.exp(policy).sum()))
        divergences.append(float((p_plus * (np.log(p_plus) - policy)).sum()))
    return {"mass": masses, "kl": divergences}


def run(cell: dict[str, Any], folder: Path) -> dict[str, float]:
    data = Prompts(shares_of(cell))
    reference = exact_model(data.mixture)
    before = measure(reference, data)
    with tempfile.TemporaryDirectory() as output_dir:
        trainer = KTOTrainer(
            exact_model(data.mixture),
            reference,
            KTOConfig(
                output_dir=output_dir,
                max_steps=cell["steps"],
                per_device_train_batch_size=BATCH,
                learning_rate=0.02,
                lr_scheduler_type="linear",
                adam_beta2=0.98,
                max_grad_norm=10.0,
                seed=cell["seed"],
                **study.TINY_RUN,
                **METHODS[cell["method"]],
            ),
            train_dataset=data.dataset(with_shares="(x)" in cell["method"]).shuffle(seed=cell["seed"]),
            processing_class=tokenizer(len(data.shares)),
        )
        study.train(trainer)
    after = measure(trainer.model, data)
    result = {"alpha": float(data.share), "kl": float(np.mean(after["kl"]))}
    result["kl_reference"] = float(np.mean(before["kl"]))
    for share, mass, kl, kl_before in zip(shares_of(cell), after["mass"], after["kl"], before["kl"], strict=True):
        result |= {f"mass_{share}": mass, f"kl_{share}": kl, f"kl_reference_{share}": kl_before}
    return result


def table(rows: list[dict[str, Any]]) -> str:
    """The mass on rated answers and KL by prompt."""
    shares, alpha = shares_of(rows[0]), rows[0]["alpha"]
    reference = [f"{rows[0]['kl_reference']:.3f}", *(f"0.999, {rows[0][f'kl_reference_{s}']:.3f}" for s in shares)]
    lines = [["(reference)", *reference]]
    for (method,), members in study.group(rows, ["method"]).items():
        by_share = [
            f"{study.mean_and_error(members, f'mass_{s}')[0]:.3f}, {study.mean_and_error(members, f'kl_{s}')[0]:.3f}"
            for s in shares
        ]
        lines.append([method, study.cell_text(members, "kl"), *by_share])
    header = ["method", "mean KL", *(f"alpha(x) = {share}" for share in shares)]
    predicted = ", ".join(f"{min(1, share / alpha):.3f}" for share in shares)
    head = (
        f"KL(p+ || policy) in nats; by prompt the policy's mass on all rated answers, then KL. alpha = {alpha:.3f}; "
        f"predicted masses with one alpha, min(1, alpha(x)/alpha): {predicted}."
    )
    return f"{head}\n\n" + study.markdown(header, lines)


def draw(rows: list[dict[str, Any]]):
    from matplotlib.figure import Figure

    shares, alpha = shares_of(rows[0]), rows[0]["alpha"]
    figure = Figure(figsize=(10, 4), layout="constrained")
    mass, divergence = figure.subplots(1, 2, sharex=True)
    for i, ((method,), members) in enumerate(study.group(rows, ["method"]).items()):
        style = {"label": method, "color": f"C{i // 2}", "linestyle": "-" if "(x)" in method else "--"}
        for axes, name in ((mass, "mass"), (divergence, "kl")):
            points = [{"share": s, name: row[f"{name}_{s}"]} for row in members for s in shares]
            study.error_bars(axes, points, "share", name, **style)
    grid = np.linspace(min(shares), max(shares), 200)
    mass.plot(grid, np.minimum(1, grid / alpha), color="black", linewidth=1, label="predicted: alpha(x)/alpha")
    divergence.plot(shares, [rows[0][f"kl_reference_{s}"] for s in shares], "k:", label="reference, before training")
    mass.set(ylabel="mass on rated answers", ylim=(0, 1.05), title="what is left for the answers people rated")
    divergence.set(ylabel="KL(p+ || policy), nats", yscale="log", title="distance from p+")
    for axes in (mass, divergence):
        axes.set(xlabel="share of preferred answers of the prompt, alpha(x)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


STUDY = study.Study("prompt_shares", cells, run, table, draw)

if __name__ == "__main__":
    study.main(STUDY)
