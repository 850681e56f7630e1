"""`make bench-reward`: scoring in process and over gRPC, against the same functions in numpy and scipy.

Both sides must first compute the same scores (1e-6); then they are timed in turns. Rows of target/bench/reward.json: `core`
(responses per second on one core, against the target), `python` (against reward functions in TRL's interface, which get one completion at
a time), `python-grouped` (against functions that share work within a group), `grpc` (through the service, client and server on all cores of
this machine, against the target), `grpc-p99` (latency of a group at half of the target load, against the target).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from shapes import OUT
from table import machine, row, spread, write

HERE = Path(__file__).parent
BENCH = OUT.parent / "release" / "reward_bench"
TARGET_CORE, TARGET_GRPC, TARGET_P99 = 50_000, 20_000, 5.0


def run(*command):
    """Returns the last line of a program's output, parsed as JSON."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def compare(folder):
    """Fails unless the two sides compute the same scores."""
    ours, peer = run(BENCH, "values"), run(sys.executable, HERE / "reward_peer.py", folder, "values")
    assert len(ours) == len(peer) > 0
    worst = 0.0
    for a, b in zip(ours, peer):
        for x, y in zip(a, b):
            worst = max(worst, abs(x - y))
    if not worst < 1e-6:
        sys.exit(f"bench-reward: the two sides differ by {worst}")
    print(f"bench-reward: {len(ours)} responses, scores within {worst:.1e} of each other")


def main():
    """Runs the benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    seen = {"core": [], "python": [], "grouped": [], "grpc": [], "p99": []}
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([str(BENCH), "write", folder], check=True)
        compare(folder)
        for _ in range(args.rounds):
            seen["core"].append(run(BENCH, "core", args.seconds)["rate"])
            for form, name in (("flat", "python"), ("grouped", "grouped")):
                seen[name].append(run(sys.executable, HERE / "reward_peer.py", folder, form, args.seconds)["rate"])
            server = subprocess.Popen([str(BENCH), "serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            try:
                address = json.loads(server.stdout.readline())["address"]
                run(BENCH, "load", address, 0.5, 0)
                seen["grpc"].append(run(BENCH, "load", address, args.seconds, 0)["rate"])
                seen["p99"].append(run(BENCH, "load", address, args.seconds, TARGET_GRPC / 2)["p99_ms"])
            finally:
                server.stdin.close()
                server.wait(timeout=20)
    middle = {name: median(values) for name, values in seen.items()}
    unit = "responses/s"
    rows = [
        row("core", unit, middle["core"], TARGET_CORE, "target, one core", middle["core"] / TARGET_CORE, spread(seen["core"])),
        *(row(title, unit, middle["core"], middle[name], peer, middle["core"] / middle[name],
              spread([a / b for a, b in zip(seen["core"], seen[name])]))
          for title, name, peer in (("python", "python", "numpy and scipy as TRL calls them, one core"),
                                    ("python-grouped", "grouped", "the same, once per group, one core"))),
        row("grpc", unit, middle["grpc"], TARGET_GRPC, "target, client and server on all cores", middle["grpc"] / TARGET_GRPC,
            spread(seen["grpc"])),
        row("grpc-p99", f"ms per group at {TARGET_GRPC // 2} responses/s", middle["p99"], TARGET_P99, "aim", TARGET_P99 / middle["p99"],
            spread(seen["p99"])),
    ]
    write("reward", machine(), rows, [f"{args.rounds} rounds of {args.seconds} s, medians; groups of 8, two rows of 1024 f32 each"])


if __name__ == "__main__":
    main()
