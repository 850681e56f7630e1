"""Peak memory of updates against the plan that `unveil plan` makes of them: `make bench-memory`.

Each case is a process of its own that runs two updates of stage 1 or stage 2 on the CPU in fp32, on random data. Its highest resident
memory above that of a process with libtorch and without a model is compared with the total of the plan, which must be within 15 % of it,
and whose part without a use (`other_gib`) must be at most 10 %. malloc returns large blocks to the system at once
(MALLOC_MMAP_THRESHOLD_), so that the resident memory is what tensors occupy.

The formulas count what autograd keeps. They were compared with hooks on saved tensors for the layers of the 100m shape; the other two
shapes are deep and narrow, and wide and shallow.

Rows, for each shape (shapes.py has the sizes):
    SHAPE-STAGE-full, SHAPE-STAGE-lora              one pass over all groups, activations kept
    SHAPE-STAGE-full-recompute, …-lora-recompute    activations recomputed

    memory.py --shapes 100m,45m-deep,135m-wide
"""

import json
import os
import subprocess

import options
import shapes
import table
from process import ROOT
from rollout import binary

TOLERANCE, OTHER = 0.15, 0.10
# Stage, adapter rank, recomputation.
CASES = [(stage, rank, recompute) for stage in ("sft", "learner") for rank in (0, 16) for recompute in (False, True)]
SIZES = {"sft": dict(groups=8, n=1, new=128), "learner": dict(groups=2, n=8, new=96)}


def measure(shape, stage, rank, recompute, threads):
    """Returns the plan and the measured peak of one case."""
    case = dict(stage=stage, lora=rank, recompute=recompute, threads=threads, **SIZES[stage])
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    command = [binary("memory_bench"), shapes.make(shape, "float32"), json.dumps(case)]
    done = subprocess.run([str(c) for c in command], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)
    reply = json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {"error": f"it ended with {done.returncode}"}
    if "error" in reply:
        raise SystemExit(f"bench: {shape} {case}: {reply['error']}")
    return reply["plan"], reply["measured_gib"]


def main():
    args = options.parse(options.parser(__doc__, "memory", "100m,45m-deep,135m-wide", rounds=1))
    rows, faults, notes = [], [], []
    for shape in args.shapes:
        for stage, rank, recompute in CASES:
            name = f"{shape}-{stage}-{'lora' if rank else 'full'}{'-recompute' if recompute else ''}"
            plan, measured = measure(shape, stage, rank, recompute, args.threads)
            ratio = plan["total_gib"] / measured
            rows.append(table.row(name, "GiB, planned and measured", plan["total_gib"], measured, "peak resident memory", ratio))
            parts = ", ".join(f"{key[:-4]} {plan[key]:.2f}" for key in plan if key.endswith("_gib") and key != "capacity_gib")
            notes.append(f"{name}: {parts}")
            print("bench:", notes[-1], flush=True)
            if abs(ratio - 1) > TOLERANCE:
                faults.append(f"{name}: the plan is {ratio:.2f} of the measured peak")
            if plan["other_gib"] > OTHER * plan["total_gib"] * 1.0001:
                faults.append(f"{name}: {plan['other_gib']:.2f} GiB have no use")
    table.write(args.name, table.machine(), rows, notes)
    if faults:
        raise SystemExit("bench: " + "; ".join(faults))


if __name__ == "__main__":
    main()
