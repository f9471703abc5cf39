"""`trl-rdro dpo`: train on pairs, under `accelerate launch`."""

from .launch import launch


def main(argv: list[str]) -> int:
    return launch("dpo", argv)
