"""Rows of a benchmark, with medians, spread and a description of the machine, and their JSON file.

A row: name, unit, ours, peer, peer_name, ratio, spread. `ratio` above 1 means ours is better; if `peer` is null, the row is
a share of a limit and `ratio` is that share. `spread` is (highest - lowest) / median of the ratios of the single rounds.
"""

import json
import os
import platform
from statistics import median

from shapes import OUT


def spread(ratios):
    """Returns (highest - lowest) / median."""
    return (max(ratios) - min(ratios)) / median(ratios) if median(ratios) else 0.0


def row(name, unit, ours, peer, peer_name, ratio, spread=None):
    """Prints and returns a row."""
    def short(x):
        return "-" if x is None else f"{x:.4g}"
    print(f"{name:28} {short(ours):>9} {short(peer):>9}  ratio {short(ratio):>7}  spread {short(spread):>7}  "
          f"{unit}{f'; peer: {peer_name}' if peer_name else ''}", flush=True)
    return dict(name=name, unit=unit, ours=ours, peer=peer, peer_name=peer_name, ratio=ratio, spread=spread)


def machine(gpu=None):
    """Describes the machine."""
    import torch
    import transformers
    models = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")]
    kib = int(next(line for line in open("/proc/meminfo") if line.startswith("MemTotal")).split()[1])
    flags = torch.backends.cpu.get_cpu_capability()
    parts = [f"{len(os.sched_getaffinity(0))} cores {models[0] if models else platform.machine()} ({flags})",
             f"{kib / 2**20:.0f} GiB", gpu or "no GPU", f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    return ", ".join(parts)


def write(name, machine, rows, notes=()):
    """Writes target/bench/NAME.json."""
    path = OUT / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "rows": rows, "notes": list(notes)}, indent=1) + "\n")
    print(f"bench: {path}")
