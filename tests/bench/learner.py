"""Policy updates against TRL's GRPO update step, in turns: part of `make bench-learner`.

A batch is 4 prompts, each with one image of 256 tokens and about 30 text tokens, and n responses of 64 tokens to each. An update is
forward, loss (clip, token mean over the batch), backward, clipping by norm and AdamW, from token ids and pixel values on the host.
TRL's side runs the steps of its trainer on a generated and rewarded batch: `GRPOTrainer.compute_loss`, backward, clipping,
torch's AdamW. Both sides start from the same random weights and get the same batch, log-probabilities and advantages, with the same
number of threads, as processes that wait for input during the other's turn.

First, both sides must compute the same loss and the same gradient norm; otherwise the benchmark fails.

Rows, for each shape (shapes.py has the sizes):
    SHAPE-n8, SHAPE-n4       samples (responses) per second with 8 and 4 responses per prompt
    SHAPE-memory-n8          peak memory of an update above the loaded model

    learner.py --shapes tiny --rounds 5 [--ranks] [--sync]
"""

import os
import sys
from statistics import median

import options
import ranks
import shapes
import sync
import table
from process import Child, Quiet
from rollout import binary, calls_for

GROUPS, NEW = 4, 64


class Pair:
    """Both sides with the same model and batch."""

    def __init__(self, shape, n, args):
        self.dir, prompts = shapes.make(shape, "float32"), shapes.prompts(shape, GROUPS)
        self.batch = shapes.OUT / "models" / f"{shape}-learner-n{n}.safetensors"
        here = os.path.dirname(os.path.abspath(__file__))
        peer = [sys.executable, f"{here}/learner_peer.py", self.dir, prompts, n, NEW, self.batch, args.threads]
        self.peer = Child(f"{shape}-learner-peer", peer, args.threads)
        ours = [binary("learner_bench"), self.dir, prompts, self.batch, args.threads]
        self.ours = Child(f"{shape}-learner-ours", ours, args.threads)
        self.quiet = Quiet(args.others)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in (self.ours, self.peer):
            child.__exit__()

    def turn(self, side, calls):
        """Returns the seconds of one update."""
        own = self.ours.cpu_seconds, self.peer.cpu_seconds
        reply = self.quiet.turn(lambda: sum(cpu() for cpu in own), lambda: side.ask("update", calls=calls))
        return sum(reply["seconds"]) / calls


def check(shape, n, pair):
    """Checks that the first update of both sides has the same loss and gradient norm."""
    ours, peer = pair.ours.ask("update", calls=1), pair.peer.ask("update", calls=1)
    for key in ("loss", "grad_norm"):
        gap = abs(ours[key] - peer[key])
        if gap > 1e-3 * max(abs(peer[key]), 1e-3):
            raise SystemExit(f"bench: {shape}-n{n}: {key} is {ours[key]} on our side and {peer[key]} on the peer's: the two sides do "
                             "not compute the same update")
    return (f"{shape}-n{n}: both sides compute a loss of {peer['loss']:.6f} and a gradient norm of {peer['grad_norm']:.6f} (ours "
            f"{ours['loss']:.6f}, {ours['grad_norm']:.6f})")


def measure(shape, n, args):
    with Pair(shape, n, args) as pair:
        base = pair.ours.resident_mib(), pair.peer.resident_mib()
        note = check(shape, n, pair)
        print("bench:", note, flush=True)
        peaks = [side.peak_mib() - b for side, b in zip((pair.ours, pair.peer), base)]
        calls = [calls_for(pair.turn(side, 2)) for side in (pair.ours, pair.peer)]
        seconds = [], []
        for r in range(args.rounds):
            for i in (0, 1) if r % 2 == 0 else (1, 0):
                seconds[i].append(pair.turn((pair.ours, pair.peer)[i], calls[i]))
        ratios = [p / o for o, p in zip(*seconds)]
        samples = GROUPS * n
        rows = [table.row(f"{shape}-n{n}", "samples/s", samples / median(seconds[0]), samples / median(seconds[1]),
                          "TRL GRPOTrainer, sdpa", median(ratios), table.spread(ratios))]
        if n == 8:
            rows.append(table.row(f"{shape}-memory-n{n}", "MiB of host memory above the loaded model", *peaks,
                                  "TRL GRPOTrainer, sdpa", peaks[1] / peaks[0]))
        return rows, note


def main():
    parser = options.parser(__doc__, "learner", "tiny", rounds=5)
    parser.add_argument("--sync", action="store_true", help="also measure the rows of sync.py")
    parser.add_argument("--ranks", action="store_true", help="also measure the rows of ranks.py")
    args = options.parse(parser)
    rows, notes = [], []
    for shape in args.shapes:
        print(f"bench: {shape}: {shapes.parameters(shape):,} parameters", flush=True)
        for n in (8, 4):
            more, note = measure(shape, n, args)
            rows += more
            notes.append(note)
    if args.ranks:
        more, notes_of_ranks = ranks.measure(args.shapes[0], args.rounds)
        rows, notes = rows + more, notes + notes_of_ranks
    if args.sync:
        more, notes_of_sync = sync.measure(sync.Options())
        rows, notes = rows + more, notes + notes_of_sync
    table.write(args.name, table.machine(), rows, notes)


if __name__ == "__main__":
    main()
