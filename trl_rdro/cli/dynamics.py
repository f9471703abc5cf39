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
from ..iterate import dpo_dynamics, dynamics
from ..tools.yaml_files import read_text
from .dynamics_reports import dpo_report, ipo_report, one_shot_report
from .parsing import Parser, require_between, require_directory_of, require_png


GRID = 100  # points along each axis of the diagram
MOST_ROUNDS = 100_000  # a few seconds
MOST_DPO_ROUNDS = 1000  # each fits a Bradley-Terry model
MOST_NUMBERS = 10**7  # rounds times answers
LARGEST = 1e6  # b and b lam: beyond it a round's logits are noise


def make_parser() -> Parser:
    parser = Parser(
        prog="trl-rdro dynamics",
        description="Iterate pi_{t+1} = softmax(a log pi_t + (1-a) log pi_0 + b P mu_t), mu_t = lam pi_t + (1-lam) "
        "pi_0, on given preferences P: rounds of sampling, judging and training with IPO, seen as a whole. Prints "
        "whether the loop settles, oscillates or collapses to one answer, its fixed point, and its stability margin. "
        "With --loss dpo the rounds are those of population DPO, and what one of them keeps of P's order is printed.",
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
    parser.add_argument("--loss", choices=["ipo", "dpo"], default="ipo", help="what a round trains (default: ipo)")
    parser.add_argument("--b", type=float, help="the step of ipo: 1/tau")
    parser.add_argument("--beta", type=float, help="beta of dpo")
    parser.add_argument(
        "--label_smoothing", type=float, metavar="E", help="of dpo (then `cdpo`), below 0.5: judges by (1-2E) P + E"
    )
    parser.add_argument(
        "--sampling",
        type=float,
        nargs="+",
        metavar="W",
        help="weights of the answers in the pairs of one round: whether it keeps P's order (dpo: default pi_0)",
    )
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
    require_between("--beta", args.beta, 1 / LARGEST, LARGEST)
    require_between("--label_smoothing", args.label_smoothing, 0, 0.499)
    check_loss(args)
    require_between("--rounds", args.rounds, 1, MOST_ROUNDS)
    require_between("--entropy_floor", args.entropy_floor, 0)
    require_between("--plot_max", args.plot_max, 0, LARGEST)
    require_directory_of(args.output)
    require_directory_of(args.plot)
    if args.plot is None:
        return
    require_png("--plot", args.plot)
    if args.loss == "dpo":
        raise UserError("--plot draws the regimes of --loss ipo: leave it out")
    if args.lam == 0:
        raise UserError("with --lam 0 the diagram over a and b lam has no height: leave --plot out, or raise --lam")
    if args.plot_max == 0 or (args.plot_max is None and args.b == 0):
        raise UserError("the diagram needs a --plot_max above 0")


def check_loss(args: argparse.Namespace) -> None:
    """Refuse a loss without its step, with that of the other, or with more rounds than it can be solved for."""
    needed, strange = {"ipo": ("b", ("beta", "label_smoothing")), "dpo": ("beta", ("b",))}[args.loss]
    if getattr(args, needed) is None:
        raise UserError(f"--loss {args.loss} needs --{needed}")
    for name in strange:
        if getattr(args, name) is not None:
            raise UserError(f"--{name} is no option of --loss {args.loss}: leave it out")
    if args.loss == "dpo" and args.rounds > MOST_DPO_ROUNDS:
        raise UserError(f"--rounds must be at most {MOST_DPO_ROUNDS} with --loss dpo, got {args.rounds}")


def shares_of(option: str, weights: list[float] | None, answers: int) -> np.ndarray:
    """The weights of --reference or --sampling as a distribution; uniform where there are none."""
    if weights is None:
        return np.full(answers, 1 / answers)
    if len(weights) != answers:
        raise UserError(f"{option} has {len(weights)} weights for {answers} answers")
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"{option} needs weights above 0: an answer that is never given is never found")
    shares = np.array(weights) / max(weights)
    return shares / shares.sum()


def round_of(args: argparse.Namespace, P: np.ndarray) -> dpo_dynamics.Rewards:
    """The log-ratios that one round of the loss trains, of what is sampled."""
    if args.loss == "ipo":
        return lambda mu: args.b * P @ mu
    judge = dpo_dynamics.smoothed(P, args.label_smoothing or 0.0)
    return lambda mu: dpo_dynamics.dpo_rewards(judge, mu, args.beta)


def main(argv: list[str]) -> int:
    args = make_parser().parse_args(argv)
    check(args)
    P = preferences(args)
    if args.rounds * len(P) > MOST_NUMBERS:
        raise UserError(f"{args.rounds} rounds of {len(P)} answers are too many to keep: lower --rounds")
    reference = shares_of("--reference", args.reference, len(P))
    sampling = reference if args.sampling is None else shares_of("--sampling", args.sampling, len(P))
    if args.loss == "dpo":
        settings = (args.a, args.beta, args.lam, reference, args.rounds, args.entropy_floor)
        result = dpo_dynamics.dpo_study(P, *settings, label_smoothing=args.label_smoothing or 0.0)
        print(dpo_report(result))
    else:
        with user_error(ArithmeticError):
            result = dynamics.study(P, args.a, args.b, args.lam, reference, args.rounds, args.entropy_floor)
        print(ipo_report(result))
    if args.loss == "dpo" or args.sampling is not None:
        result["one_shot"] = dpo_dynamics.one_shot(P, sampling, round_of(args, P))
        print(one_shot_report(result["one_shot"]))
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
