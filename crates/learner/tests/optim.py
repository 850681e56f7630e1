"""torch.optim.AdamW with clip_grad_norm_ on the gradients of IN. Usage: optim.py IN OUT LR CLIP DECAY"""
import sys

import torch
from safetensors.torch import load_file, save_file

src, dst = sys.argv[1:3]
lr, clip, decay = map(float, sys.argv[3:6])
x = load_file(src)
params = {n: x[n].clone().requires_grad_(True) for n in ("matrix", "vector")}
groups = [dict(params=[params["matrix"]], weight_decay=decay), dict(params=[params["vector"]], weight_decay=0.0)]
opt = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8)
for step in range(x["grad_matrix"].shape[0]):
    for n, p in params.items():
        p.grad = x[f"grad_{n}"][step].clone()
    torch.nn.utils.clip_grad_norm_(params.values(), clip)
    for g in opt.param_groups:
        g["lr"] = lr * (step + 1)
    opt.step()
out = {n: p.detach() for n, p in params.items()}
for n, p in params.items():
    out[f"exp_avg.{n}"] = opt.state[p]["exp_avg"]
    out[f"exp_avg_sq.{n}"] = opt.state[p]["exp_avg_sq"]
save_file(out, dst)
