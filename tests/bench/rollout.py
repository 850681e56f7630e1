"""Rollout against `generate` of transformers, in turns: `make bench-rollout`, `make bench-gpu`.

Each of 4 prompts has one image of 256 tokens and about 30 text tokens; n responses of 64 tokens are sampled for each, at
temperature 1 without filters. The result is tokens per second over complete calls, from pixel values to tokens on the host,
including image encoding. Both sides use the same random weights with the same number of threads, as processes that wait for
input during the other's turn. Ours also returns log-probabilities and attention rows; the peer does not.

First, both sides must generate the same 64 greedy tokens for each prompt; otherwise the benchmark fails with the first
difference. In bfloat16, where rounding decides near ties, this is checked with the 6m shape in float32 on the same device, and for
the shape itself our tokens must be close to the peer's highest logits on average. The peer uses its fastest cache, measured before the
rounds.

Rows, for each shape (shapes.py has the sizes):
    SHAPE-n8, SHAPE-n1       tokens per second with 8 and 1 responses per prompt, attention capture on
    SHAPE-attention-n8       fraction of rollout time spent on the capture: ours with and without it, in turns
    SHAPE-images-n8          number of times that each image is encoded
    SHAPE-memory-n8          peak memory of one call above the loaded model, in a separate process
    SHAPE-growth-n8          our peak of a call with 8 responses per prompt, divided by that with 1
    SHAPE-bandwidth-n8       (--bandwidth) share of the memory-bandwidth bound of decoding 64 responses: bytes of weights,
                             keys and values that a step must read, divided by the bandwidth of a large copy and by the
                             time of a step
`spread` is (highest - lowest) / median of the ratios of the rounds. A turn waits until the machine is idle, and is repeated
if other programs used more than --others cores meanwhile. The notes give the number of repetitions and the CPU time of the idle
side.

    rollout.py --shapes 6m,100m --rounds 5 [--device cuda --dtype bfloat16] [--load] [--name rollout]
"""

import os
import sys
from statistics import mean, median

import load
import options
import shapes
import table
from process import Child, Quiet

GROUPS, PROMPTS, NEW, TURN_SECONDS = 4, 8, 64, 2.0
CLOSE = 0.25  # standard deviations of the logits; tokens of another model are about 4 below the highest


class Pair:
    """Both sides with the same model, and the CPU time of the waiting side."""

    def __init__(self, shape, args, dtype=None):
        self.shape, self.args, self.dtype = shape, args, dtype or args.dtype
        self.dir = shapes.make(shape, self.dtype)
        self.file = shapes.prompts(shape, PROMPTS)
        self.idle = self.waited = 0.0
        self.quiet = Quiet(args.others)

    def start(self, side):
        rest = [self.dir, self.file, self.args.device, self.dtype, self.args.threads]
        here = os.path.dirname(os.path.abspath(__file__))
        program = [binary("rollout_bench")] if side == "ours" else [sys.executable, f"{here}/peer.py"]
        return Child(f"{self.shape}-{side}", program + rest, self.args.threads)

    def __enter__(self):
        self.ours, self.peer = self.start("ours"), self.start("peer")
        return self

    def __exit__(self, *_):
        for child in (self.ours, self.peer):
            child.__exit__()

    def turn(self, side, **command):
        """Returns the seconds of each call of one turn; the other side must sleep."""
        other = self.peer if side is self.ours else self.ours
        own = self.ours.cpu_seconds, self.peer.cpu_seconds
        before = other.cpu_seconds()
        reply = self.quiet.turn(lambda: sum(cpu() for cpu in own), lambda: side.ask("generate", **command))
        self.idle += other.cpu_seconds() - before
        self.waited += sum(reply["seconds"])
        return reply["seconds"]


def binary(name):
    path = shapes.OUT.parent / "release" / name
    if not path.exists():
        raise SystemExit(f"bench: {path} is missing; run it through make, or cargo build --release -p unveil-bench --bins")
    return path


def check(pair):
    """Checks for equal greedy tokens, or for near ties in bfloat16."""
    ours = pair.ours.ask("greedy", groups=GROUPS, new=NEW)["tokens"]
    if pair.dtype != "float32":
        gaps = pair.peer.ask("gaps", responses=ours)["gaps"]
        gap = mean(gap for row in gaps for gap in row)
        if not gap <= CLOSE:
            raise SystemExit(f"bench: {pair.shape}: our greedy tokens are {gap:.3f} standard deviations below the peer's highest "
                             "logits on average: the two sides do not run the same model")
        return f"{pair.shape}: our greedy tokens lie {gap:.4f} standard deviations below the peer's highest logits on average"
    peer = pair.peer.ask("greedy", groups=GROUPS, new=NEW)["tokens"]
    for g, (a, b) in enumerate(zip(ours, peer, strict=True)):
        different = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        if different is not None or len(a) != len(b):
            i = min(len(a), len(b)) if different is None else different
            gap = pair.peer.ask("gaps", responses=ours)["gaps"][g][i]
            raise SystemExit(f"bench: {pair.shape}: greedy token {i} of prompt {g} differs: ours {a[i:i + 1]}, the peer's "
                             f"{b[i:i + 1]}, whose logits the peer sees {gap:.1e} standard deviations apart: the two sides do "
                             "not run the same model (rounding explains gaps up to about 1e-4)")
    kinds = len({t for row in peer for t in row})
    return f"{pair.shape}: {GROUPS} x {NEW} greedy tokens are equal ({kinds} different ones)"


def fastest_cache(pair, n, names):
    """Returns the peer's cache with the shortest second call (the first may compile), and the times of all caches."""
    times = {}
    for cache in names:
        pair.peer.ask("generate", groups=GROUPS, n=n, new=NEW, cache=cache, calls=1)
        times[cache] = min(pair.turn(pair.peer, groups=GROUPS, n=n, new=NEW, cache=cache, calls=2))
    print(f"{pair.shape}-n{n}: seconds of a call of the peer by cache: "
          + ", ".join(f"{c} {t:.2f}" for c, t in times.items()), flush=True)
    return min(times, key=times.get), times


def rounds(pair, n, caches, count):
    """Runs turns A B A B …, with the first of a round alternating; returns seconds per call of each side, and of ours without capture."""
    cache, times = fastest_cache(pair, n, caches)
    work = dict(groups=GROUPS, n=n, new=NEW)
    pair.ours.ask("generate", **work, capture=True, calls=1)
    pair.ours.ask("generate", **work, capture=False, calls=1)
    own = min(pair.turn(pair.ours, **work, capture=True, calls=2))
    calls = {"ours": calls_for(own), "plain": calls_for(own), "peer": calls_for(times[cache])}
    sides = {
        "plain": lambda seed: pair.turn(pair.ours, **work, capture=False, calls=calls["plain"], seed=seed),
        "ours": lambda seed: pair.turn(pair.ours, **work, capture=True, calls=calls["ours"], seed=seed),
        "peer": lambda seed: pair.turn(pair.peer, **work, cache=cache, calls=calls["peer"], seed=seed),
    }
    if n == 1:
        del sides["plain"]
    seconds = {name: [] for name in sides}
    for r in range(count):
        order = list(sides) if r % 2 == 0 else list(sides)[::-1]
        for name in order:
            seconds[name].append(sum(sides[name](1000 * r)) / calls[name])
    return seconds, cache


def calls_for(seconds):
    """Returns the number of calls in a turn, so that it is long compared with clock resolution and scheduling."""
    return max(1, round(TURN_SECONDS / seconds))


def speed_rows(pair, count, caches):
    rows, shape = [], pair.shape
    for n in (8, 1):
        seconds, cache = rounds(pair, n, caches, count)
        tokens, ratios = GROUPS * n * NEW, [p / o for o, p in zip(seconds["ours"], seconds["peer"])]
        rows.append(table.row(
            f"{shape}-n{n}", "tokens/s", tokens / median(seconds["ours"]), tokens / median(seconds["peer"]),
            f"transformers generate, sdpa, {cache} cache", median(ratios), table.spread(ratios)))
        if n > 1:
            shares = [1 - p / o for o, p in zip(seconds["ours"], seconds["plain"])]
            share = median(shares)
            rows.append(table.row(f"{shape}-attention-n{n}", "share of rollout time", share, None, None, share,
                                  max(shares) - min(shares)))
    return rows


def memory_rows(pair):
    """Measures the peak memory of one call in a fresh process, and the number of encoded images."""
    above, images, shape = {}, {}, pair.shape
    for side, n, how in (("ours", 1, {"capture": True}), ("ours", 8, {"capture": True}), ("peer", 8, {"cache": "dynamic"})):
        with pair.start(side) as child:
            base = child.resident_mib()
            reply = child.ask("generate", groups=GROUPS, n=n, new=NEW, calls=1, **how)
            above[side, n], images[side, n] = max(child.peak_mib() - base, 0.0), reply["images"] / GROUPS
    ours, peer, one = above["ours", 8], above["peer", 8], above["ours", 1]
    return [
        table.row(f"{shape}-images-n8", "vision passes per image", images["ours", 8], images["peer", 8],
                  "transformers generate", images["peer", 8] / images["ours", 8]),
        table.row(f"{shape}-memory-n8", "MiB of host memory above the loaded model", ours, peer,
                  "transformers generate, dynamic cache", peer / ours),
        table.row(f"{shape}-growth-n8", "MiB of host memory above the loaded model", ours, one, "ours with n = 1", one / ours),
    ]


def bandwidth_row(pair, count):
    """Measures decoding of 64 responses (8 prompts x 8) against the memory bandwidth."""
    text, groups, n, short = shapes.config_of(pair.shape).text_config, PROMPTS, 8, 16
    size = {"float32": 4, "bfloat16": 2}[pair.dtype]
    weights = shapes.decoder_parameters(pair.shape) * size
    head = text.hidden_size // text.num_attention_heads
    token = 2 * text.num_hidden_layers * text.num_key_value_heads * head * size
    prompt = shapes.GRID[1] * shapes.GRID[2] // 4 + shapes.TEXT_TOKENS
    step_bytes = weights + token * (groups * prompt + groups * n * (short + NEW) / 2)
    shares, bounds, steps = [], [], []
    work = dict(groups=groups, n=n, capture=True)
    pair.ours.ask("generate", **work, new=NEW, calls=1)
    for _ in range(count):
        # Calls of two lengths differ in decode steps only; the mean length of these steps is half way between them.
        calls = calls_for(median(pair.turn(pair.ours, **work, new=short, calls=1)))
        first = median(pair.turn(pair.ours, **work, new=short, calls=calls))
        second = median(pair.turn(pair.ours, **work, new=NEW, calls=calls))
        rate = pair.peer.ask("bandwidth")["bytes_per_second"]
        steps.append((second - first) / (NEW - short))
        bounds.append(step_bytes / rate)
        shares.append(bounds[-1] / steps[-1])
    share = median(shares)
    print(f"{pair.shape}: a step takes {median(steps) * 1e3:.3f} ms, its {step_bytes / 2**20:.0f} MiB at the bandwidth of a "
          f"copy {median(bounds) * 1e3:.3f} ms", flush=True)
    return table.row(f"{pair.shape}-bandwidth-n8", "share of the memory-bandwidth bound", share, None, None, share,
                     table.spread(shares))


def main():
    parser = options.parser(__doc__, "rollout", "6m,100m", rounds=7)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--caches", default="dynamic,static-compiled",
                        help="caches of the peer to choose from: dynamic, static, static-compiled")
    parser.add_argument("--bandwidth", action="store_true", help="also measure the share of the memory-bandwidth bound")
    parser.add_argument("--load", action="store_true", help="also measure the rows of load.py")
    args = options.parse(parser)
    if args.device != "cpu":
        require_gpu()
    caches = args.caches.split(",")
    rows, notes, gpu = [], [], None
    if args.dtype != "float32":
        with Pair("6m", args, "float32") as pair:
            notes.append(check(pair))
            print("bench:", notes[-1], flush=True)
    for shape in args.shapes:
        print(f"bench: {shape}: {shapes.parameters(shape):,} parameters", flush=True)
        with Pair(shape, args) as pair:
            gpu = pair.peer.ready.get("gpu")
            notes.append(check(pair))
            print("bench:", notes[-1], flush=True)
            rows += speed_rows(pair, args.rounds, caches)
            if args.bandwidth:
                rows.append(bandwidth_row(pair, args.rounds))
            notes.append(f"{shape}: the waiting side used {pair.idle / pair.waited:.1%} of one core; "
                         f"{pair.quiet.repeated} turn(s) were repeated because other programs ran")
            print("bench:", notes[-1], flush=True)
        rows += memory_rows(pair)
    if args.load:
        rows += load.measure(load.Options())
    table.write(args.name, table.machine(gpu), rows, notes)


def require_gpu():
    import torch
    if not torch.cuda.is_available():
        raise SystemExit("bench: no usable GPU (torch.cuda.is_available() is false): bench-gpu needs an NVIDIA GPU and "
                         "its driver; make bench-rollout runs on the CPU")


if __name__ == "__main__":
    main()
