"""All contact with undocumented names: `trl` and `second_reference` hold TRL's, `engines` those of FSDP2, ZeRO-3 and
checkpointing.

Each name is pinned by `tests/compat`: a release that moves one fails there, with a sentence, and is mended here.
"""
