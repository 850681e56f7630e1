"""Weight sync from a learner to a worker on the same host, as a share of plain loopback TCP: part of `make bench-learner`.

Two processes of `sync_bench` (crates/bench) hold tensors of the 3B shape in the transferred dtype. A sync is the weight
transfer of one version in a run: the learner copies its tensors into chunks with CRC-32C, the worker fetches them over gRPC, verifies
every chunk and the whole, and copies them into its model. The measured time covers all of this, on an otherwise idle machine. The limit is
the same number of bytes between the same two processes over a plain TCP connection, with one buffer of 1 MiB on each side and without
checksums. The methods take turns; the first of a round alternates. A sync before the measurement allocates the buffers. Then the worker
receives the same bytes by a broadcast over Gloo, whose group is created by a first broadcast.

Rows:
    3b-grpc-sync     bytes per second; ratio = share of the plain rate (target 0.25), peer null
    3b-gloo-sync     broadcast to one worker; peer = the gRPC stream of the same round
"""

import argparse
import json
import pathlib
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median

import shapes
import table
from process import Child

PROGRAM = shapes.OUT.parent / "release" / "sync_bench"


def chosen(shape, gigabytes, width):
    """Returns names and shapes of the model, or of its first tensors up to a size."""
    out, total = {}, 0
    for name, size in shapes.tensors_of(shapes.config_of(shape)).items():
        total += shapes.torch.Size(size).numel() * width
        if gigabytes and out and total > gigabytes * 1e9:
            break
        out[name] = list(size)
    return out


def both(pool, sender, receiver, op):
    """Sends a command to both sides at the same time; returns both replies and the seconds until the later one."""
    start = time.perf_counter()
    replies = [pool.submit(child.ask, op) for child in (sender, receiver)]
    return [r.result() for r in replies], time.perf_counter() - start


def measure(options):
    """Returns all rows."""
    if not PROGRAM.exists():
        raise SystemExit(f"bench: {PROGRAM} is missing; run it through make, or cargo build --release -p unveil-bench --bins")
    width = {"bfloat16": 2, "float32": 4}[options.dtype]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "shapes.json"
        path.write_text(json.dumps(chosen(options.shape, options.gigabytes, width)))
        with Child("sync-send", [PROGRAM, "send", path, options.dtype], 1) as sender:
            ready = sender.ready
            command = [PROGRAM, "receive", path, options.dtype, ready["address"], ready["raw"]]
            with Child("sync-receive", command, 1) as receiver, ThreadPoolExecutor(2) as pool:
                return rounds(options, pool, sender, receiver, ready["bytes"])


def broadcast(pool, sender, receiver):
    """Runs one sync by broadcast in an existing group; returns the same as `both`."""
    receiver.ask("join")
    both(pool, sender, receiver, "sync")
    sender.ask("sent")
    found = both(pool, sender, receiver, "sync")
    deadline = time.monotonic() + 10
    while not sender.ask("sent")["broadcasts"]:
        if time.monotonic() > deadline:
            raise SystemExit("bench: a version was streamed instead of broadcast")
        time.sleep(0.01)
    receiver.ask("leave")
    return found


def rounds(options, pool, sender, receiver, size):
    both(pool, sender, receiver, "sync")
    seconds = {"sync": [], "raw": [], "broadcast": []}
    for r in range(options.rounds):
        for op in ("sync", "raw", "broadcast") if r % 2 == 0 else ("broadcast", "raw", "sync"):
            if op == "broadcast":
                (sent, got), took = broadcast(pool, sender, receiver)
            else:
                (sent, got), took = both(pool, sender, receiver, op)
            seconds[op].append(took)
            print(f"{op}: {size / took / 1e9:.2f} GB/s, {took:.2f} s ({json.dumps(sent)}, {json.dumps(got)})", flush=True)
    shares = [raw / sync for raw, sync in zip(seconds["raw"], seconds["sync"])]
    gains = [sync / cast for sync, cast in zip(seconds["sync"], seconds["broadcast"])]
    rate = {op: size / median(took) / 1e9 for op, took in seconds.items()}
    notes = [f"{size} bytes, {options.dtype}; plain loopback TCP {rate['raw']:.3f} GB/s; peak resident "
             f"{sender.peak_mib():.0f} MiB of the sender and {receiver.peak_mib():.0f} MiB of the receiver"]
    print(f"bench: {notes[0]}", flush=True)
    grpc, gloo = f"{options.shape}-grpc-sync", f"{options.shape}-gloo-sync"
    return [table.row(grpc, "GB/s", rate["sync"], None, None, median(shares), table.spread(shares)),
            table.row(gloo, "GB/s", rate["broadcast"], rate["sync"], "gRPC stream", median(gains),
                      table.spread(gains))], notes


@dataclass
class Options:
    """Options of the measurement."""

    shape: str = "3b"
    gigabytes: float = 0
    dtype: str = "bfloat16"
    rounds: int = 5


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="3b", choices=list(shapes.SHAPES))
    parser.add_argument("--gigabytes", type=float, default=0, help="only the first tensors up to this size; 0: all")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=5)
    rows, notes = measure(Options(**vars(parser.parse_args())))
    table.write("sync", table.machine(), rows, notes)


if __name__ == "__main__":
    main()
