"""Options of the benchmarks that compare two programs over several shapes."""

import argparse
import os

import shapes


def parser(description, name, default_shapes, rounds):
    """Returns a parser of the shared options; `name` is the default name of the written file."""
    made = argparse.ArgumentParser(description=description.splitlines()[0])
    made.add_argument("--shapes", default=default_shapes, help=f"of {','.join(shapes.SHAPES)}")
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of each side")
    made.add_argument("--others", type=float, default=0.1, help="maximum cores that other programs may use during a turn")
    made.add_argument("--name", default=name, help="name of the file under target/bench")
    return made


def parse(made):
    """Returns the options with `shapes` as a list, or exits with a message."""
    args = made.parse_args()
    args.shapes = args.shapes.split(",")
    unknown = [s for s in args.shapes if s not in shapes.SHAPES]
    if unknown:
        made.error(f"there is no shape {unknown[0]}, there are {', '.join(shapes.SHAPES)}")
    if args.rounds < 1:
        made.error("--rounds must be at least 1")
    return args
