"""Two ranks of a learner on this host: fraction of the gradient all-reduce that is hidden behind the backward pass; part of
`make bench-learner`.

Each rank is a process with one thread and computes half of the batch of learner.py; ranks communicate over Gloo on loopback. Updates that
start the all-reduce layer by layer during the backward pass alternate with updates that start it afterwards. The result is the waiting time of
the rank that arrives last, since the other one also waits for it.

Rows:
    SHAPE-ranks2-hidden      1 - wait with overlap / wait without; peer null
"""

import argparse
import socket
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import shapes
import table
from process import Child
from rollout import binary

RANKS, GROUPS, N, NEW = 2, 4, 8, 64


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def measure(shape, rounds):
    """Returns all rows; learner.py has written the batch."""
    prompts = shapes.prompts(shape, GROUPS)
    batch = shapes.OUT / "models" / f"{shape}-learner-n{N}.safetensors"
    if not batch.exists():
        raise SystemExit(f"bench: {batch} is missing: learner.py creates it")
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(RANKS) as pool:
        def start(rank):
            command = [binary("learner_bench"), shapes.make(shape, "float32"), prompts, batch, 1, rank, RANKS, address]
            return Child(f"{shape}-rank{rank}", command, 1)
        ranks = list(pool.map(start, range(RANKS)))
        try:
            def turn(overlap):
                """Returns the median seconds of an update, and of the waiting of the last rank."""
                replies = list(pool.map(lambda c: c.ask("update", calls=6, overlap=overlap), ranks))
                last = [min(waits) for waits in zip(*(r["waits"] for r in replies))]
                return median(max(s) for s in zip(*(r["seconds"] for r in replies))), median(last)
            turn(True)
            found = {True: [], False: []}
            for r in range(rounds):
                for overlap in (True, False) if r % 2 == 0 else (False, True):
                    found[overlap].append(turn(overlap))
        finally:
            for child in ranks:
                child.__exit__()
    shares = [1 - a / b for (_, a), (_, b) in zip(found[True], found[False])]
    update, wait = ({o: median(v[i] for v in found[o]) * 1e3 for o in found} for i in (0, 1))
    notes = [f"{shape}, {RANKS} ranks of one thread: an update takes {update[True]:.0f} ms, of which the last rank waits {wait[True]:.2f} "
             f"ms for the all-reduce; {update[False]:.0f} ms and {wait[False]:.2f} ms if it starts after the backward pass"]
    print("bench:", notes[0], flush=True)
    return [table.row(f"{shape}-ranks{RANKS}-hidden", "share of the sums' time", median(shares), None, None, median(shares),
                      table.spread(shares))], notes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tiny", choices=list(shapes.SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows, notes = measure(args.shape, args.rounds)
    table.write("ranks", table.machine(), rows, notes)


if __name__ == "__main__":
    main()
