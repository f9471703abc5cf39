"""Operations of a forward over a batch of pairs, stock and packed: multiply-adds times two.

Counted are the linear layers of all positions that are forwarded, attention, and the LM head. Here, on a CPU, stock
TRL scores every position and gives attention a mask, which costs the full square of the padded length. On a GPU both
sides score completions only, and FlashAttention leaves out padding and the future on both.
"""

# The shares of layers, head and attention are those of 6 layers of 256 with a vocabulary of 32,000, at a third of the
# cost
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "vocab_size": 10_000}
MODELS = {  # hidden, layers, heads, heads of keys, size of a head, intermediate, vocabulary; on a GPU
    "here": (256, 2, 4, 2, 64, 704, 10_000, False),
    "Qwen2.5-7B": (3584, 28, 28, 4, 128, 18_944, 152_064, True),
}
# In forwards, that of the reference included; a backward is two, to the embeddings alone one
PASSES = {"wdpo": 1 + 1 + 1 + 2 + 4, "wdpo one_sided": 1 + 3 + 3}


def passes(ours: str) -> int:
    loss, *how = ours.split()
    return PASSES.get(" ".join([loss, *(["one_sided"] if "one_sided" in how else [])]), 1 + 3)


def forward_flops(model: str, pairs: list[tuple[int, int, int]], kind: str) -> float:
    """
    Args:
        pairs: tokens of prompt, chosen and rejected, those of a batch.
        kind: "stock", "packed" or "shared".
    """
    hidden, layers, heads, kv_heads, size, intermediate, vocabulary, gpu = MODELS[model]
    layer = hidden * (heads + 2 * kv_heads) * size + heads * size * hidden + 3 * hidden * intermediate
    rows = [prompt + completion for prompt, *both in pairs for completion in both]
    causal = sum(row**2 for row in rows) / 2
    completions = sum(chosen + rejected for _, chosen, rejected in pairs)
    if kind == "stock":
        tokens = len(rows) * max(rows)
        attended, scored = (causal, completions) if gpu else (len(rows) * max(rows) ** 2, tokens)
    else:
        repeated = sum(prompt - 1 for prompt, _, _ in pairs) if kind == "shared" else 0
        again = sum((prompt - 1) ** 2 for prompt, _, _ in pairs) / 2 if kind == "shared" else 0
        tokens, attended, scored = sum(rows) - repeated, causal - again, completions
    return 2 * layers * layer * tokens + 4 * layers * heads * size * attended + 2 * hidden * vocabulary * scored
