"""Loading a model directory against reading its files: `make bench-load`.

The directory has the published 3B configuration and random bfloat16 weights in shards of up to 5 GB (7.5 GB in total; written
once, kept under target/bench/models). Ours loads it in a fresh process and then reads one byte of every page of every parameter.
The limit is a sequential read(2) of the same files into one 8 MiB buffer. Both use the same page cache: *warm*, completely
cached; *cold*, dropped before every turn (both states are verified with mincore). The sides take turns; the first of a round alternates.

Rows:
    3b-warm-load, 3b-cold-load     bytes per second; ratio = share of the rate of the plain read
    3b-memory-load                 our peak resident memory, anonymous and file-backed together, per byte of weights
    3b-transformers-load           (warm, --transformers) seconds of `from_pretrained` and touching every page, against ours

`spread` is (highest - lowest) / median of the ratios of the rounds.
"""

import argparse
import ctypes
import json
import mmap
import os
import subprocess
import sys
from dataclasses import dataclass
from statistics import median

import shapes
import table

TRANSFORMERS = """
import sys, time, torch
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging
logging.set_verbosity_error()
start = time.perf_counter()
model = Qwen2_5_VLForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to(sys.argv[2])
for value in model.parameters():
    value.detach().reshape(-1)[::2048].float().sum().item()
print('{"seconds":%f}' % (time.perf_counter() - start))
"""


@dataclass
class Options:
    """Options of the measurement."""

    shape: str = "3b"
    rounds: int = 5
    device: str = "cpu"
    transformers: bool = True


def weight_files(directory):
    """Returns the shards."""
    return sorted(directory.glob("*.safetensors"))


def resident(path):
    """Returns the fraction of a file in the page cache."""
    size = path.stat().st_size
    pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    with open(path, "rb") as file:
        at = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
    if at in (None, ctypes.c_void_p(-1).value):
        raise SystemExit(f"bench: cannot map {path}: {os.strerror(ctypes.get_errno())}")
    flags = ctypes.create_string_buffer(pages)
    failed = libc.mincore(at, size, flags)
    libc.munmap(at, size)
    if failed:
        raise SystemExit(f"bench: mincore on {path}: {os.strerror(ctypes.get_errno())}")
    return sum(b & 1 for b in flags.raw[:pages]) / pages


def prepare(files, state):
    """Fills or drops the page cache of the files, and verifies the result."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        if state == "cold":
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        elif resident(path) < 1:
            buffer = memoryview(bytearray(8 << 20))
            while os.readv(descriptor, [buffer]):
                pass
        os.close(descriptor)
        share = resident(path)
        if state == "cold" and share > 0.01:
            raise SystemExit(f"bench: {share:.0%} of {path} stays in the page cache, so a cold load cannot be measured here")
        if state == "warm" and share < 0.99:
            raise SystemExit(f"bench: only {share:.0%} of {path} stays in the page cache: more free memory is needed for a warm "
                             "load")


def run(command):
    """Runs a fresh process and returns its JSON line."""
    done = subprocess.run([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"bench: {command[0]} {command[1]} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(options):
    """Returns all rows."""
    directory, name = shapes.make(options.shape, "bfloat16"), options.shape
    program = shapes.OUT.parent / "release" / "load_bench"
    if not program.exists():
        raise SystemExit(f"bench: {program} is missing; run it through make, or cargo build --release -p unveil-bench --bins")
    files = weight_files(directory)
    ours = [program, "model", directory, options.device, "bfloat16"]
    raw = [program, "raw", directory]
    rows, last, warm = [], {}, []
    for state in ("warm", "cold"):
        seconds = {"ours": [], "raw": []}
        for r in range(options.rounds):
            sides = [("ours", ours), ("raw", raw)]
            for side, command in sides if r % 2 == 0 else sides[::-1]:
                prepare(files, state)
                reply = run(command)
                seconds[side].append(reply["seconds"])
                last[side] = reply
        print(f"{name}-{state}: seconds of ours {[round(s, 2) for s in seconds['ours']]}, of the plain read "
              f"{[round(s, 2) for s in seconds['raw']]}", flush=True)
        size = last["raw"]["bytes"]
        if last["ours"]["bytes"] > size or last["ours"]["bytes"] < 0.999 * size:
            raise SystemExit(f"bench: {last['ours']['bytes']} bytes of parameters against {size} bytes of files")
        shares = [b / a for a, b in zip(seconds["ours"], seconds["raw"])]
        rows.append(table.row(
            f"{name}-{state}-load", "GB/s", size / median(seconds["ours"]) / 1e9, size / median(seconds["raw"]) / 1e9,
            f"read(2) of the files, {state} page cache", median(shares), table.spread(shares)))
        if state == "warm":
            warm = seconds["ours"]
            rows.append(memory_row(name, last["ours"]))
    if options.transformers:
        rows.append(transformers_row(name, directory, files, options, median(warm)))
    return rows


def memory_row(name, reply):
    weights = reply["bytes"] / 1024
    print(f"{name}: {weights / 2**20:.2f} GiB of weights; at the end {reply['anonymous_kib'] / 2**20:.2f} GiB anonymous and "
          f"{reply['file_kib'] / 2**20:.2f} GiB of file pages resident, peak {reply['peak_kib'] / 2**20:.2f} GiB; "
          f"{reply['load_seconds']:.2f} s until loaded, {reply['seconds']:.2f} s until touched", flush=True)
    share = reply["peak_kib"] / weights
    return table.row(f"{name}-memory-load", "peak resident bytes per byte of weights", share, 1.0, "one copy", 1 / share)


def transformers_row(name, directory, files, options, ours):
    seconds = []
    for _ in range(2):
        prepare(files, "warm")
        seconds.append(run([sys.executable, "-c", TRANSFORMERS, directory, options.device])["seconds"])
    peer = min(seconds)
    return table.row(f"{name}-transformers-load", "seconds", ours, peer, "transformers from_pretrained", peer / ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="3b", choices=list(shapes.SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--no-transformers", dest="transformers", action="store_false", help="skip from_pretrained")
    options = Options(**vars(parser.parse_args()))
    table.write("load", table.machine(), measure(options))


if __name__ == "__main__":
    main()
