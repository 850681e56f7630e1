"""Errors of the precision modes of `run.compute` on the CPU: `make bench-precision`.

For each dtype of the weights and each mode: |delta log p| between step-by-step decoding and one teacher-forced pass over the same
tokens (what learner.agreement_limit bounds), the distance of that pass from fp32, and the losses of updates of stage 1 beside those in
fp32. The weights are bf16 numbers in every row. The limits are AGREEMENT_LIMITS in crates/model/src/compute.rs; a mean above its limit fails.

    precision.py --shape 100m --steps 50
"""

import argparse
import json
import subprocess

import shapes
from process import ROOT
from rollout import binary


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="100m", choices=shapes.SHAPES)
    parser.add_argument("--steps", type=int, default=50, help="updates of stage 1")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    command = [binary("precision_bench"), shapes.make(args.shape, "bfloat16"), args.threads, args.steps]
    print("| weights | compute | n x tokens | mean | max | limit | from fp32 | last loss | mean loss difference |\n|" + "---|" * 9)
    process = subprocess.Popen([str(c) for c in command], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    reference, above = None, []
    for line in process.stdout:
        row = json.loads(line)
        if "error" in row:
            raise SystemExit(f"bench: {row['error']}")
        losses = row["sft"]
        reference = reference or losses
        difference = sum(abs(a - b) for a, b in zip(losses, reference)) / max(len(losses), 1)
        for d in row["decode"]:
            cells = [row["dtype"], row["compute"], f"{d['n']} x {d['tokens']}", f"{d['mean']:.1e}", f"{d['max']:.1e}",
                     f"{row['limit']:.0e}", f"{d['from_fp32']:.1e}", f"{losses[-1]:.4f}" if losses else "-", f"{difference:.1e}"]
            print("| " + " | ".join(cells) + " |", flush=True)
            if d["mean"] > row["limit"]:
                above.append(f"{row['dtype']} {row['compute']}: mean {d['mean']:.1e} is above {row['limit']:.0e}")
    if process.wait() or above:
        raise SystemExit("bench: " + ("; ".join(above) or f"precision_bench ended with {process.returncode}"))


if __name__ == "__main__":
    main()
