"""
`trl-rdro dynamics`: whether a loop of sampling, judging and training will settle, circle or collapse.

What to consult before choosing a, lam and b of an iterated run. No model is involved; see `trl_rdro.iterate.dynamics`.
"""

import argparse
import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, user_error
from ..iterate import dynamics
from ..tools.yaml_files import read_text
from .parsing import Parser, require_between, require_directory_of, require_png


GRID = 100  # points along each axis of the diagram
MOST_ROUNDS = 100_000  # a few seconds
MOST_NUMBERS = 10**7  # rounds times answers
LARGEST = 1e6  # b and b lam: beyond it a round's logits are noise


def make_parser() -> Parser:
    parser = Parser(
        prog="trl-rdro dynamics",
        description="Iterate pi_{t+1} = softmax(a log pi_t + (1-a) log pi_0 + b P mu_t), mu_t = lam pi_t + (1-lam) "
        "pi_0, on given preferences P: rounds of sampling, judging and training with IPO, seen as a whole. Prints "
        "whether the loop settles, oscillates or collapses to one answer, its fixed point, and its stability margin.",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--cycle", type=float, metavar="C", help="three answers, each preferred to the next with probability 1/2 + C"
    )
    source.add_argument(
        "--rewards", type=float, nargs="+", metavar="R", help="Bradley-Terry: one reward for each answer"
    )
    source.add_argument(
        "--preferences",
        metavar="FILE",
        help="a .json or .csv file of rows: P[i][j] is the probability that answer i is preferred to answer j",
    )
    parser.add_argument(
        "--a", type=float, required=True, help="how far the reference follows the policy: 0 never, 1 all"
    )
    parser.add_argument("--b", type=float, required=True, help="the step: 1/tau of IPO")
    parser.add_argument(
        "--lam", type=float, default=1.0, help="share of the answers drawn from the policy (default: 1)"
    )
    parser.add_argument(
        "--reference", type=float, nargs="+", metavar="W", help="pi_0 as weights of the answers (default: all equal)"
    )
    parser.add_argument("--rounds", type=int, default=100, metavar="N", help="rounds to simulate (default: 100)")
    parser.add_argument(
        "--entropy_floor", type=float, metavar="H", help="nats below which it is a collapse (default: 0.1 log K)"
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write everything, the policy of each round included, as JSON"
    )
    parser.add_argument("--plot", metavar="FILE", help="draw the regimes over a and b lam as a PNG")
    parser.add_argument(
        "--plot_max", type=float, metavar="X", help="the largest b lam of the diagram (default: twice yours)"
    )
    return parser


def read_preferences(name: str) -> Any:
    path = Path(name)
    if path.suffix.lower() not in (".json", ".csv"):
        raise UserError(f"preferences are read from a .json or .csv file, not {name}")
    text = read_text(path)
    with user_error(ValueError, RecursionError, csv.Error, prefix=f"cannot read {name}: "):
        if path.suffix.lower() == ".json":
            return json.loads(text)
        return [[float(cell) for cell in row] for row in csv.reader(text.splitlines()) if row]


def preferences(args: argparse.Namespace) -> np.ndarray:
    if args.cycle is not None:
        require_between("--cycle", args.cycle, 0, 0.5)
        return dynamics.cycle(args.cycle)
    if args.rewards is not None:
        if len(args.rewards) < 2 or not np.isfinite(args.rewards).all():
            raise UserError("--rewards needs two numbers or more, all finite")
        return dynamics.bradley_terry(args.rewards)
    with user_error(ValueError, prefix=f"{args.preferences}: "):
        return dynamics.check_preferences(read_preferences(args.preferences))


def check(args: argparse.Namespace) -> None:
    for name, most in (("a", 1), ("b", LARGEST), ("lam", 1)):
        require_between(f"--{name}", getattr(args, name), 0, most)
    require_between("--rounds", args.rounds, 1, MOST_ROUNDS)
    require_between("--entropy_floor", args.entropy_floor, 0)
    require_between("--plot_max", args.plot_max, 0, LARGEST)
    require_directory_of(args.output)
    require_directory_of(args.plot)
    if args.plot is None:
        return
    require_png("--plot", args.plot)
    if args.lam == 0:
        raise UserError("with --lam 0 the diagram over a and b lam has no height: leave --plot out, or raise --lam")
    if args.plot_max == 0 or (args.plot_max is None and args.b == 0):
        raise UserError("the diagram needs a --plot_max above 0")


def reference_policy(weights: list[float] | None, answers: int) -> np.ndarray:
    if weights is None:
        return np.full(answers, 1 / answers)
    if len(weights) != answers:
        raise UserError(f"--reference has {len(weights)} weights for {answers} answers")
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError("--reference needs weights above 0: an answer that pi_0 never gives is never found")
    shares = np.array(weights) / max(weights)
    return shares / shares.sum()


def report(result: dict[str, Any]) -> str:
    rate, rounds = result["rate"], len(result["policies"]) - 1
    answers = len(result["fixed_point"])
    margin = "converges from anywhere" if result["margin"] > 0 else "no promise from far away"
    turn = (
        "each round brings it closer" if rate < 1 else "each round drives it away" if rate > 1 else "no pull to pi_0"
    )
    after, left = result["settled_after"], result["entropies"][-1]
    lines = {
        "regime": result["regime"],
        "margin": f"{result['margin']:.4f}: 1 - (a + (b lam / 2) ||P - 1/2||), {margin}",
        "rate": f"{rate:.4f}: the factor per round of a small distance from the fixed point, {turn}",
        "fixed point": " ".join(f"{p:.4f}" for p in result["fixed_point"]),
        "entropy": f"{result['entropy']:.4f} nats there, of {np.log(answers):.4f}; a collapse is below "
        f"{result['entropy_floor']:.4f}",
        "simulated": "from half pi_0, half the first answer: "
        + (
            f"within {dynamics.CLOSE} of it for good after {after} rounds"
            if after is not None
            else f"not within {dynamics.CLOSE} of it after {rounds} rounds; entropy then {left:.4f} nats"
        ),
    }
    return "\n".join(f"{name:13}{text}" for name, text in lines.items())


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    check(args)
    P = preferences(args)
    if args.rounds * len(P) > MOST_NUMBERS:
        raise UserError(f"{args.rounds} rounds of {len(P)} answers are too many to keep: lower --rounds")
    reference = reference_policy(args.reference, len(P))
    with user_error(ArithmeticError):
        result = dynamics.study(P, args.a, args.b, args.lam, reference, args.rounds, args.entropy_floor)
    print(report(result))
    if args.output is not None:
        with user_error(OSError):
            Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    if args.plot is not None:
        plot(args, P, reference, result["entropy_floor"])
    return 0


def plot(args: argparse.Namespace, P: np.ndarray, reference: np.ndarray, entropy_floor: float) -> None:
    """Draw the regimes around this loop, and say where."""
    from ..iterate.phase_plot import plot_phase_diagram

    most = 2 * args.b * args.lam if args.plot_max is None else args.plot_max
    a, b_lam = np.linspace(0, 1, GRID), np.linspace(0, most, GRID)
    with user_error(ArithmeticError):
        diagram = dynamics.phase_diagram(P, a, b_lam, args.lam, reference, entropy_floor)
    with user_error(OSError):
        print(plot_phase_diagram(diagram, a, b_lam, args.plot, here=(args.a, args.b * args.lam)))
