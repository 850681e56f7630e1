"""Peer of the checkpoint benchmark: torch.distributed.checkpoint of the same tensors to a local directory, in one process.

`checkpoint_peer.py SHAPES.json THREADS`: parameters in fp32 with two moments each; commands `save` and `load` with `url`. Its writer uses
THREADS threads and syncs its files, like ours.
"""

import json
import sys
import time

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter


def main():
    shapes, threads = json.load(open(sys.argv[1])), int(sys.argv[2])
    torch.set_num_threads(threads)
    state = {f"{kind}.{name}": torch.randn(size) if kind == "weight" else torch.zeros(size)
             for name, size in shapes.items() for kind in ("weight", "exp_avg", "exp_avg_sq")}
    size = sum(t.numel() * t.element_size() for t in state.values())
    print(json.dumps({"bytes": size}), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        start = time.perf_counter()
        if command["op"] == "save":
            writer = FileSystemWriter(command["url"], thread_count=threads, sync_files=True)
            dcp.save(state, storage_writer=writer, no_dist=True)
        else:
            dcp.load(state, storage_reader=FileSystemReader(command["url"]), no_dist=True)
        print(json.dumps({"seconds": time.perf_counter() - start, "bytes": size}), flush=True)


if __name__ == "__main__":
    main()
