"""Thin subclasses of TRL's trainers. TRL keeps doing data, logging, checkpoints; only the loss is ours."""
