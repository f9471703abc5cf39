"""
The frozen first layers of a language model, computed once for each text.

Adapters on the last fifth of the layers leave what the others make of a text as it is, in every step of every run of a
study. In a causal model that is a function of the tokens up to each position: an embedding of prefixes. So the last
layers, with that function in the place of their token embedding, are the same model, and what it gives is kept.
"""

import torch
from torch import nn


def freeze_first_layers(model: nn.Module, layers: int, kept: dict[tuple[int, ...], torch.Tensor]) -> nn.Module:
    """Make the first `layers` of a Llama-like `model` such an embedding, in place, and return the model.

    Afterwards there are no gradients of those layers or of the token embeddings (`wdpo` needs the latter), and no
    generation with a cache. Rows must be padded on the right, as TRL pads whole texts.

    Args:
        kept: the states of the texts that have been seen, by their tokens; models with the same frozen layers may
            share it.
    """
    decoder = model.get_decoder()
    decoder.embed_tokens = _Prefixes(decoder, layers, kept)
    decoder.layers = decoder.layers[layers:]
    model.config.num_hidden_layers -= layers
    model.config.use_cache = False  # with one, the model would see single tokens
    return model


class _Prefixes(nn.Module):
    def __init__(self, decoder: nn.Module, layers: int, kept: dict[tuple[int, ...], torch.Tensor]):
        super().__init__()
        self.kept = kept
        self.embedding_dim = decoder.config.hidden_size
        self.padding = decoder.config.pad_token_id
        # Not a submodule: nothing in it is trained, moved or saved
        self.parts = (decoder.embed_tokens, decoder.layers[:layers], decoder.rotary_emb)

    @torch.no_grad()
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        dtype = self.parts[0].weight.dtype
        states = torch.zeros(*input_ids.shape, self.embedding_dim, dtype=dtype, device=input_ids.device)
        for row, ids in zip(states, input_ids.tolist(), strict=True):
            while ids and ids[-1] == self.padding:
                ids.pop()
            text = self._text((*ids, self.padding))[: len(row)]  # the padding may be the text's last token
            row[: len(text)] = text
        return states

    def _text(self, ids: tuple[int, ...]) -> torch.Tensor:
        if ids not in self.kept:
            embed_tokens, layers, rotary_embedding = self.parts
            states = embed_tokens(torch.tensor([ids]))
            positions = torch.arange(len(ids))[None]
            rotation = rotary_embedding(states, positions)
            for layer in layers:
                states = layer(states, position_embeddings=rotation, position_ids=positions)
            self.kept[ids] = states[0]
        return self.kept[ids]
