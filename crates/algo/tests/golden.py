"""Independent PyTorch computation of advantages, losses and gradients. Usage: golden.py IN.safetensors OUT.safetensors SETTINGS.json"""
import json
import sys

import torch
from safetensors.torch import load_file, save_file

src, dst, settings = sys.argv[1:4]
s = json.load(open(settings))
x = load_file(src)
out = {}

# --- advantages -------------------------------------------------------------------------------------------------------------
rewards, mask = x["rewards"].double(), x["reward_mask"].bool()  # [G, n]
for scale in (False, True):
    rows = []
    for r, m in zip(rewards, mask):
        a = torch.full_like(r, float("nan"))
        present = r[m]
        if len(present):
            centred = present - present.mean()
            if scale:
                centred = centred / (present.std() + 1e-6) if len(present) > 1 else centred * 0
            if (present - present[0]).abs().max() < 1e-9:
                centred = centred * 0
            a[m] = centred
        rows.append(a)
    out[f"group_advantages_{int(scale)}"] = torch.stack(rows).float()

ends = x["lengths"].long().cumsum(0).tolist()
adv, tgt, begin = [], [], 0
for end, r in zip(ends, x["final_rewards"].double().tolist()):
    v = x["old_values"][begin:end].double()
    T = end - begin
    rewards_t = torch.zeros(T, dtype=torch.double)
    rewards_t[-1] = r
    v_next = torch.cat([v[1:], torch.zeros(1, dtype=torch.double)])
    delta = rewards_t + s["gamma"] * v_next - v
    # closed form: A_t = sum_k (gamma lambda)^k delta_{t+k}
    a = torch.stack([sum((s["gamma"] * s["lambda"]) ** (k - t) * delta[k] for k in range(t, T)) for t in range(T)])
    adv.append(a)
    tgt.append(a + v)
    begin = end
adv, tgt = torch.cat(adv), torch.cat(tgt)
out["gae"], out["targets"] = adv.float(), tgt.float()
out["whitened"] = ((adv - adv.mean()) / torch.sqrt(adv.var(correction=1) + 1e-8)).float()

# --- losses -----------------------------------------------------------------------------------------------------------------
leaf = {k: x[k].double().requires_grad_(True) for k in ("logprobs", "entropy", "values", "scores")}
lp, old, A = leaf["logprobs"], x["old_logprobs"].double(), x["advantages"].double()
N = lp.numel()
ratio = torch.exp(lp - old)
surrogate = torch.where(A >= 0, torch.minimum(ratio, torch.tensor(1 + s["clip_high"], dtype=torch.double)) * A,
                        torch.maximum(ratio, torch.tensor(1 - s["clip_low"], dtype=torch.double)) * A)
policy = -surrogate.sum() / N
v, ov, t = leaf["values"], x["old_values"].double(), x["value_targets"].double()
if s["value_clip"] > 0:
    vc = torch.minimum(torch.maximum(v, ov - s["value_clip"]), ov + s["value_clip"])
    value = 0.5 * torch.maximum((v - t) ** 2, (vc - t) ** 2).mean()
else:
    value = 0.5 * ((v - t) ** 2).mean()
entropy = leaf["entropy"].mean()
d = x["reference"].double() - lp
kl = (torch.exp(d) - d - 1).mean()
attention = torch.softmax(leaf["scores"], -1)
per_response = []
for r in range(x["coverage"].shape[0]):
    mine = x["mention_tokens"][x["mention_response"] == r].long()
    a = x["baseline"][r].double()
    if len(mine) == 0:
        per_response.append(torch.zeros((), dtype=torch.double))
        continue
    mass = (attention[mine] * x["coverage"][r].double()).sum(-1).mean()
    per_response.append((mass - a) / (1 - a))
relevance = torch.stack(per_response).mean()
loss = (policy + s["value_coef"] * value - s["entropy_coef"] * entropy + s["kl_coef"] * kl - s["attention_coef"] * relevance)
loss.backward()
parts = dict(loss=loss, policy=policy, value=value, entropy=entropy, kl=kl, attention=relevance,
             clip_fraction=((ratio < 1 - s["clip_low"]) | (ratio > 1 + s["clip_high"])).double().mean(),
             approx_kl=(ratio - 1 - (lp - old)).mean())
for k, p in parts.items():
    out[f"part_{k}"] = p.detach().float().reshape(1)
for k, p in leaf.items():
    out[f"grad_{k}"] = p.grad.float()
save_file({k: t.contiguous() for k, t in out.items()}, dst)
