"""torch.optim.AdamW with clip_grad_norm_ on the gradients of IN. Usage: optim.py IN LR CLIP DECAY [OUT FROZEN KIND RATE]…

Each OUT is the result of a run whose vector is frozen in the first FROZEN steps and has RATE times the learning rate. With KIND bfloat16, gradients and parameters are rounded
to bfloat16, and the optimiser uses fp32 copies of the parameters.
"""
import sys

import torch
from safetensors.torch import load_file, save_file

lr, clip, decay = map(float, sys.argv[2:5])
x = load_file(sys.argv[1])


def run(frozen, kind, rate):
    params = {n: x[n].to(kind).float().clone().requires_grad_(True) for n in ("matrix", "vector")}
    groups = [dict(params=[params["matrix"]], weight_decay=decay), dict(params=[params["vector"]], weight_decay=0.0)]
    rates = [1.0, rate]
    opt = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
    for step in range(x["grad_matrix"].shape[0]):
        for n, p in params.items():
            is_frozen = n == "vector" and step < frozen
            p.grad = None if is_frozen else x[f"grad_{n}"][step].to(kind).float().clone()  # it is clipped in place
        torch.nn.utils.clip_grad_norm_(params.values(), clip)
        for g, r in zip(opt.param_groups, rates):
            g["lr"] = lr * (step + 1) * r
        opt.step()
    out = {n: p.detach() for n, p in params.items()}
    for n, p in params.items():
        out[f"exp_avg.{n}"] = opt.state[p]["exp_avg"]
        out[f"exp_avg_sq.{n}"] = opt.state[p]["exp_avg_sq"]
        out[f"rounded.{n}"] = p.detach().to(kind).float().clone()
        out[f"step.{n}"] = opt.state[p]["step"].view(1)
    return out


runs = sys.argv[5:]
for out, frozen, kind, rate in zip(runs[::4], runs[1::4], runs[2::4], runs[3::4]):
    save_file(run(int(frozen), getattr(torch, kind), float(rate)), out)
