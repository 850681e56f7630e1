"""Two ranks of a learner on this host: how much of the gradients' sum over ranks is hidden behind the backward pass; part of
`make bench-learner`.

Each rank is a process with one thread and computes half of the batch of learner.py; ranks talk by Gloo over loopback. In turns: an
update whose sums begin layer by layer while the backward pass goes on, one whose sums all begin after it, and the sums alone. On two
cores a sum that is under way takes processor time from the backward pass, so the share is a lower bound of what hosts with cores
to spare reach.

Rows:
    SHAPE-ranks2-hidden      (update without overlap - update with it) / sums alone; peer null
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
    """All rows; learner.py has made the batch."""
    prompts = shapes.prompts(shape, GROUPS)
    batch = shapes.OUT / "models" / f"{shape}-learner-n{N}.safetensors"
    if not batch.exists():
        raise SystemExit(f"bench: {batch} is missing: learner.py makes it")
    address = f"127.0.0.1:{free_port()}"
    with ThreadPoolExecutor(RANKS) as pool:
        def start(rank):
            command = [binary("learner_bench"), shapes.make(shape, "float32"), prompts, batch, 1, rank, RANKS, address]
            return Child(f"{shape}-rank{rank}", command, 1)
        ranks = list(pool.map(start, range(RANKS)))
        try:
            def turn(op, calls, overlap):
                """Seconds of one call, of the slower rank."""
                replies = list(pool.map(lambda c: c.ask(op, calls=calls, overlap=overlap), ranks))
                return max(sum(r["seconds"]) / calls for r in replies)
            turn("update", 2, True)
            kinds = {"with": ("update", 4, True), "without": ("update", 4, False), "sums": ("sum", 20, True)}
            seconds = {k: [] for k in kinds}
            for r in range(rounds):
                for kind in list(kinds) if r % 2 == 0 else reversed(list(kinds)):
                    seconds[kind].append(turn(*kinds[kind]))
        finally:
            for child in ranks:
                child.__exit__()
    shares = [(b - a) / c for a, b, c in zip(*(seconds[k] for k in kinds))]
    mid = {k: median(v) for k, v in seconds.items()}
    notes = [f"{shape}, {RANKS} ranks of one thread: an update takes {mid['with'] * 1e3:.0f} ms, {mid['without'] * 1e3:.0f} ms where sums "
             f"begin after the backward pass, the sums alone {mid['sums'] * 1e3:.1f} ms"]
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
