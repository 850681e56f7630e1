"""Saving and loading checkpoints: `make bench-checkpoint`.

The state is that of a learner of the 100m shape: weights in fp32 and two moments, 1.2 GB. A save is all of it: the copy in host memory,
objects with BLAKE3, manifest, log entry; to local disk with every file synced. A load reads, checks every byte, and puts the tensors in
their place; from local disk its files are dropped from the page cache first. In turns, each save to a place of its own; the first of a
round alternates. Limits and peer:

    raw     the same client writes the same bytes as objects of the same sizes (in parts of 16 MiB, 8 in flight, where the store
            has parts), and reads them in ranges of 16 MiB, 8 in flight; nothing is hashed or copied
    dcp     torch.distributed.checkpoint, one process, as many writer threads as cores, files synced

Rows (GB/s):
    local-save-raw, local-load-raw, s3-save-raw, s3-load-raw   ratio = share of the raw rate (aim 0.8), peer null
    local-save-dcp, local-load-dcp                             against torch.distributed.checkpoint (aim 1)
    copy-save                                                  what training stands still for: the copy, as a share of memcpy (aim 0.5)

The S3 server is moto on loopback, on the same cores as both sides. `spread` is (highest - lowest) / median of the ratios of the rounds.
"""

import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from statistics import median

import shapes
import table
from load import prepare
from process import Child

PROGRAM = shapes.OUT.parent / "release" / "examples" / "checkpoint_bench"
HERE = pathlib.Path(__file__).resolve().parent
SERVER = """
import sys, urllib.request
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
address = "http://%s:%d" % server.get_host_and_port()
urllib.request.urlopen(urllib.request.Request(address + "/bucket", method="PUT")).read()
print(address, flush=True)
sys.stdin.read()
"""


def cold(folder):
    """Drops a folder's files from the page cache."""
    prepare([p for p in pathlib.Path(folder).rglob("*") if p.is_file() and p.stat().st_size > 1 << 20], "cold")


def local(ours, peer, rounds, place):
    """Saves and loads on local disk, of both sides and raw."""
    sides = [("ours", ours, ""), ("raw", ours, "raw_"), ("dcp", peer, "")]
    out = {}
    for r in range(rounds):
        for side, child, prefix in sides if r % 2 == 0 else sides[::-1]:
            url = str(place / side)
            for op in ("save", "load"):
                if op == "load":
                    cold(url)
                reply = child.ask(prefix + op, url=url)
                out.setdefault((side, op), []).append(reply)
                print(f"local {side} {op}: {reply['bytes'] / reply['seconds'] / 1e9:.2f} GB/s", flush=True)
            shutil.rmtree(url)
    return out


def remote(ours, rounds):
    """Saves and loads on the S3 server, ours and raw."""
    sides, out = [("ours", ""), ("raw", "raw_")], {}
    for r in range(rounds):
        for side, prefix in sides if r % 2 == 0 else sides[::-1]:
            url = f"s3://bucket/{side}-{r}"
            for op in ("save", "load"):
                reply = ours.ask(prefix + op, url=url)
                out.setdefault((side, op), []).append(reply)
                print(f"s3 {side} {op}: {reply['bytes'] / reply['seconds'] / 1e9:.2f} GB/s", flush=True)
            ours.ask("clear", url=url)
    return out


def rate(replies):
    return median(r["bytes"] / r["seconds"] for r in replies) / 1e9


def rows_of(name, found, peer, label=None):
    """Rows of saves and loads against `raw` (a share) or a peer."""
    out = []
    for op in ("save", "load"):
        ours, other = found["ours", op], found[peer, op]
        ratios = [b["seconds"] / b["bytes"] * a["bytes"] / a["seconds"] for a, b in zip(ours, other)]
        print(f"{name}-{op}: {peer} {rate(other):.3f} GB/s", flush=True)
        out.append(table.row(f"{name}-{op}-{peer}", "GB/s", rate(ours), rate(other) if label else None, label, median(ratios),
                             table.spread(ratios)))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="100m", choices=list(shapes.SHAPES))
    parser.add_argument("--s3-shape", default="100m", choices=list(shapes.SHAPES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--program", default=str(PROGRAM), help="our side: examples/checkpoint_bench of some build")
    parser.add_argument("--dir", default=str(shapes.OUT), help="where to write: a directory on the disk to be measured")
    options = parser.parse_args()
    program = pathlib.Path(options.program)
    if not program.exists():
        raise SystemExit(f"bench: {program} is missing; run it through make, or cargo build --release --examples")
    threads = len(os.sched_getaffinity(0))
    rows, notes = [], []
    pathlib.Path(options.dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        place = pathlib.Path(folder)
        sizes = {n: list(s) for n, s in shapes.tensors_of(shapes.config_of(options.shape)).items()}
        (place / "shapes.json").write_text(json.dumps(sizes))
        model = shapes.make(options.shape, "float32")
        peer = [sys.executable, HERE / "checkpoint_peer.py", place / "shapes.json", threads]
        with Child("checkpoint", [program, model, threads], threads) as ours:
            with Child("checkpoint-peer", peer, threads) as other:
                memory = rate([ours.ask("memcpy")])
                found = local(ours, other, options.rounds, place)
            rows += rows_of("local", found, "raw") + rows_of("local", found, "dcp", "torch.distributed.checkpoint 2.11")
            # The first save takes its memory from the system; the next ones have it.
            copies = [r["bytes"] / r["copy_s"] / 1e9 for r in found["ours", "save"][1:] or found["ours", "save"]]
            rows.append(table.row("copy-save", "GB/s", median(copies), None, None, median(copies) / memory,
                                  table.spread([c / memory for c in copies])))
            notes.append(f"{found['ours', 'save'][0]['bytes']} bytes; memcpy {memory:.2f} GB/s")
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)
    try:
        os.environ.update(AWS_ENDPOINT_URL=server.stdout.readline().strip(), AWS_ALLOW_HTTP="true", AWS_REGION="us-east-1",
                          AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret")
        model = shapes.make(options.s3_shape, "float32")
        with Child("checkpoint-s3", [program, model, threads], threads) as ours:
            rows += rows_of("s3", remote(ours, options.rounds), "raw")
    finally:
        server.stdin.close()
        server.wait()
    table.write("checkpoint", table.machine(), rows, notes)


if __name__ == "__main__":
    main()
