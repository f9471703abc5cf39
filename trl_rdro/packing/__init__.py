"""Packed rows and shared prompts: batches forwarded without padding, a pair's prompt once. See docs/packing.md."""
