"""`trl-rdro kto`: train on unpaired completions, under `accelerate launch`."""

from .launch import launch


def main(argv: list[str]) -> int:
    return launch("kto", argv)
