"""Saving and loading checkpoints: `make bench-checkpoint`.

The state is that of a learner of the 100m shape in host memory: fp32 weights and two moments, 1.2 GB. A save includes the copy, objects
with BLAKE3, manifest and log entry; on local disk every file is synced. A load reads and verifies every byte and copies it into the
tensors; on local disk the files are first dropped from the page cache. The sides take turns and save to separate paths; the first side of a
round alternates. Limits and peer:

    raw     the same client writes the same bytes as objects of the same sizes (in parts of 16 MiB, 8 in flight, if the store
            supports parts), and reads them in ranges of 16 MiB, 8 in flight, without hashing and copying
    dcp     torch.distributed.checkpoint, one process, as many writer threads as cores, files synced

Rows (GB/s):
    local-save-raw, local-load-raw, s3-save-raw, s3-load-raw   ratio = share of the raw rate (target 0.8), peer null
    local-save-dcp, local-load-dcp                             against torch.distributed.checkpoint (target 1)
    copy-save                                                  the time that blocks training: the copy of a learner's state
                                                               (copy_bench), as a share of memcpy (target 0.5)

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

PROGRAMS = shapes.OUT.parent / "release"
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
    """Drops the files of a directory from the page cache."""
    prepare([p for p in pathlib.Path(folder).rglob("*") if p.is_file() and p.stat().st_size > 1 << 20], "cold")


def local(ours, peer, rounds, place):
    """Measures saves and loads on local disk: ours, peer and raw."""
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
    """Measures saves and loads on the S3 server: ours and raw."""
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


def on_s3(command, rounds, threads):
    """Starts a server, runs the measurement, and stops it."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              stderr=subprocess.DEVNULL)
    try:
        os.environ.update(AWS_ENDPOINT_URL=server.stdout.readline().strip(), AWS_ALLOW_HTTP="true", AWS_REGION="us-east-1",
                          AWS_ACCESS_KEY_ID="key", AWS_SECRET_ACCESS_KEY="secret")
        with Child("checkpoint-s3", command, threads) as ours:
            return remote(ours, rounds)
    finally:
        server.stdin.close()
        server.wait()


def copy(programs, options, threads):
    """Measures the copy of a learner's state against memcpy; the first round allocates the memory."""
    model = shapes.make(options.shape, "float32")
    command = [programs / "copy_bench", model, str(threads), str(options.rounds)]
    done = subprocess.run([str(c) for c in command], check=True, stdout=subprocess.PIPE, text=True)
    reply = json.loads(done.stdout)
    shares = [m / c for c, m in zip(reply["copy_s"][1:], reply["memcpy_s"][1:])]
    ours = reply["bytes"] / median(reply["copy_s"][1:]) / 1e9
    print(f"copy: {reply}", flush=True)
    return [table.row("copy-save", "GB/s", ours, None, None, median(shares), table.spread(shares))]


def write_shapes(shape, path):
    sizes = {n: list(s) for n, s in shapes.tensors_of(shapes.config_of(shape)).items()}
    path.write_text(json.dumps(sizes))


def rate(replies):
    return median(r["bytes"] / r["seconds"] for r in replies) / 1e9


def rows_of(name, found, peer, label=None):
    """Returns the rows of saves and loads against `raw` (a share) or a peer."""
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
    parser.add_argument("--programs", default=str(PROGRAMS), help="directory of checkpoint_bench and copy_bench")
    parser.add_argument("--no-copy", dest="copy", action="store_false", help="skip the copy of a learner's state")
    parser.add_argument("--dir", default=str(shapes.OUT), help="output directory, on the disk to measure")
    options = parser.parse_args()
    programs = pathlib.Path(options.programs)
    if not (programs / "checkpoint_bench").exists():
        raise SystemExit(f"bench: {programs / 'checkpoint_bench'} is missing; run it through make, or cargo build --release "
                         "-p unveil-bench --bins")
    threads = len(os.sched_getaffinity(0))
    rows, notes = [], []
    if options.copy:
        rows += copy(programs, options, threads)
    pathlib.Path(options.dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        place = pathlib.Path(folder)
        write_shapes(options.shape, place / "shapes.json")
        peer = [sys.executable, HERE / "checkpoint_peer.py", place / "shapes.json", threads]
        with Child("checkpoint", [programs / "checkpoint_bench", place / "shapes.json"], threads) as ours:
            notes.append(f"{ours.ready['bytes']} bytes of state")
            with Child("checkpoint-peer", peer, threads) as other:
                found = local(ours, other, options.rounds, place)
        rows += rows_of("local", found, "raw") + rows_of("local", found, "dcp", "torch.distributed.checkpoint 2.11")
        write_shapes(options.s3_shape, place / "shapes.json")
        rows += rows_of("s3", on_s3([programs / "checkpoint_bench", place / "shapes.json"], options.rounds, threads), "raw")
    table.write("checkpoint", table.machine(), rows, notes)


if __name__ == "__main__":
    main()
