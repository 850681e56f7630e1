"""Independent PyTorch computation of advantages, losses and gradients in fp64, response by response, with autograd.
Usage: golden.py IN.safetensors OUT.safetensors SETTINGS.json; settings and tensors by case, tensors as `case/key`."""
import json
import sys

import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
F64 = torch.double


def aggregate(kind, terms, s):
    """terms: per group, per response, a vector over its tokens."""
    flat = [t for group in terms for t in group]
    if kind == "Token":
        return torch.cat(flat).mean()
    if kind == "SequenceTokenMean":
        return torch.stack([t.mean() for t in flat]).mean()
    if kind == "SequenceTokenSum":
        return torch.stack([t.sum() for t in flat]).mean()
    if kind == "SequenceMaxLength":
        return torch.stack([t.sum() / s["max_length"] for t in flat]).mean()
    if kind == "GroupTokenMean":
        return torch.stack([torch.cat(group).mean() for group in terms]).mean()
    raise ValueError(kind)


def split(t, lengths):
    parts = iter(torch.split(t, [n for group in lengths for n in group]))
    return [[next(parts) for _ in group] for group in lengths]


def surrogate(lp, old, A, s):
    """-objective of one response, by cases of the advantage's sign."""
    log_ratio = lp - old
    if s["ratio"] == "Sequence":
        log_ratio = log_ratio.mean().repeat(len(lp))
    ratio = torch.exp(log_ratio)
    low, high = torch.tensor(1 - s["clip_low"], dtype=F64), torch.tensor(1 + s["clip_high"], dtype=F64)
    for_positive = torch.where(ratio < high, ratio, high) * A
    worst = torch.where(ratio > low, ratio, low)
    if s["clip_dual"] is not None:
        c = torch.tensor(s["clip_dual"], dtype=F64)
        worst = torch.where(worst < c, worst, c)
    objective = torch.where(A >= 0, for_positive, worst * A)
    outside = ((ratio < low) | (ratio > high)).double()
    if s["surrogate"] == "cispo":  # the weights as constants, so that autograd cannot see the ratio
        weights = [min(max(r, 1 - s["clip_low"]), 1 + s["clip_high"]) for r in ratio.tolist()]
        objective = torch.tensor(weights, dtype=F64) * A * lp
    return -objective, outside.detach()


def importance(old, behaviour, s):
    w = torch.exp(old - behaviour)
    if s["correction"] == "truncate":
        return torch.where(w > s["cap"], torch.tensor(s["cap"], dtype=F64), w), (w > s["cap"]).double()
    if s["correction"] == "mask":
        keep = (w >= 1 / s["cap"]) & (w <= s["cap"])
        return torch.where(keep, w, torch.zeros_like(w)), (~keep).double()
    return w, torch.zeros_like(w)


def kl(lp, ref, s):
    ratio = torch.exp(ref - lp)  # reference over policy
    value = {"K1": lp - ref, "K2": 0.5 * (lp - ref) ** 2, "K3": ratio - torch.log(ratio) - 1}[s["kl_form"]]
    if s["kl_gradient"] == "Reverse":  # the value, with the score function times log ratio as its gradient
        return value.detach() + (lp - ref).detach() * (lp - lp.detach())
    return value


def loss_case(x, s):
    leaf = {k: x[k].double().requires_grad_(True) for k in ("logprobs", "entropy", "values", "scores")}
    fixed = {k: t.double() for k, t in x.items() if k not in leaf and t.is_floating_point()}
    by = {k: split(t, s["lengths"]) for k, t in {**leaf, **fixed}.items() if t.shape[0] == len(leaf["logprobs"])}
    terms = {k: [[] for _ in s["lengths"]] for k in ("policy", "value", "entropy", "kl")}
    outside, weights, bounded = [], [], []
    for g, group in enumerate(s["lengths"]):
        for r in range(len(group)):
            one = {k: t[g][r] for k, t in by.items()}
            policy, out = surrogate(one["logprobs"], one["old"], one["advantages"], s)
            outside.append(out)
            if s["correction"] != "none":
                w, b = importance(one["old"], one["behaviour"], s)
                policy = policy * w
                weights.append(w)
                bounded.append(b)
            terms["policy"][g].append(policy)
            v, ov, t = one["values"], one["old_values"], one["targets"]
            error = (v - t) ** 2
            if s["value_clip"] > 0:
                near = torch.where((v - ov).abs() <= s["value_clip"], v, ov + torch.sign(v - ov) * s["value_clip"])
                error = torch.where((near - t) ** 2 > error, (near - t) ** 2, error)
            terms["value"][g].append(0.5 * error)
            terms["entropy"][g].append(one["entropy"])
            terms["kl"][g].append(kl(one["logprobs"], one["reference"], s))
    parts = {k: aggregate(s["aggregation"], t, s) for k, t in terms.items()}

    attention = torch.softmax(leaf["scores"], -1)
    per_response = []
    for r in range(x["coverage"].shape[0]):
        mine = x["mention_tokens"][x["mention_response"] == r].long()
        if len(mine) == 0:
            per_response.append(torch.zeros((), dtype=F64))
            continue
        mass = (attention[mine] * fixed["coverage"][r]).sum(-1).mean()
        per_response.append((mass - fixed["baseline"][r]) / (1 - fixed["baseline"][r]))
    parts["attention"] = torch.stack(per_response).mean() if per_response else torch.zeros((), dtype=F64)

    loss = s["policy_coef"] * parts["policy"]
    loss = loss + s["value_coef"] * parts["value"] - s["entropy_coef"] * parts["entropy"] + s["kl_coef"] * parts["kl"]
    loss = loss - s["attention_coef"] * parts["attention"]
    loss.backward()

    lp, old = leaf["logprobs"].detach(), fixed["old"]
    out = {"loss": loss, **parts}
    out["mean_entropy"] = leaf["entropy"].mean()
    out["mean_kl"] = torch.cat([t for group in terms["kl"] for t in group]).mean()
    out["clip_fraction"] = torch.cat(outside).mean()
    out["approx_kl"] = (torch.exp(lp - old) - 1 - (lp - old)).mean()
    if weights:
        out["importance"], out["bounded"] = torch.cat(weights).mean(), torch.cat(bounded).mean()
    out = {k: t.detach().reshape(1) for k, t in out.items()}
    for k, t in leaf.items():
        out[f"grad_{k}"] = torch.zeros_like(t) if t.grad is None else t.grad
    return out


def relative(rewards, how):
    """Advantages within one group, NaN = masked."""
    out = torch.full_like(rewards, float("nan"))
    there = ~torch.isnan(rewards)
    r = rewards[there]
    if len(r) == 0:
        return out
    if (r.max() - r.min()) < 1e-9:
        out[there] = 0
        return out
    if how == "rloo":
        out[there] = torch.stack([r[i] - torch.cat([r[:i], r[i + 1:]]).mean() for i in range(len(r))])
    else:
        out[there] = (r - r.mean()) / ((r.std() + 1e-6) if how == "grpo_std" else 1)
    return out


def advantages_case(x, s):
    lengths, how = s["lengths"], s["estimator"]
    penalty = split(x["penalty"] if s["penalised"] else torch.zeros_like(x["penalty"]), lengths)
    values, begin = split(x["values"], lengths), 0
    advantages, targets = [], []
    for g, group in enumerate(lengths):
        rewards = x["rewards"][begin:begin + len(group)]
        begin += len(group)
        shaped = rewards - torch.stack([p.sum() for p in penalty[g]])
        for r, n in enumerate(group):
            if how in ("grpo", "grpo_std", "rloo"):
                advantages.append(relative(shaped, how)[r].repeat(n))
                continue
            reward = relative(rewards, "grpo")[r] if how == "reinforce_plus_plus_baseline" else rewards[r]
            per_token = -penalty[g][r].clone()
            per_token[-1] += reward
            if how.startswith("reinforce"):  # closed form of the returns
                a = [sum(s["gamma"] ** (k - t) * per_token[k] for k in range(t, n)) for t in range(n)]
            else:  # closed form: A_t = sum_k (gamma lambda)^k delta_{t+k}
                v = values[g][r]
                delta = per_token + s["gamma"] * torch.cat([v[1:], torch.zeros(1, dtype=F64)]) - v
                a = [sum((s["gamma"] * s["lambda"]) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]
                targets.append(torch.stack(a) + v)
            advantages.append(torch.stack(a))
    a = torch.cat(advantages)
    out = {"advantages": a, "whitened": (a - a.mean()) / torch.sqrt(a.var(correction=1) + 1e-8)}
    if targets:
        out["targets"] = torch.cat(targets)
    return out


def masked_case(x, s):
    return {how: relative(x["rewards"], how) for how in ("grpo", "grpo_std", "rloo")}


def controller_case(x, s):
    coef, out = s["coef"], []
    for kl_seen in x["observed"].tolist():
        error = min(max(kl_seen / s["target"] - 1, -0.2), 0.2)
        coef = coef * (1 + s["gain"] * error)
        out.append(coef)
    return {"coefs": torch.tensor(out, dtype=F64)}


if __name__ == "__main__":
    src, dst, settings = sys.argv[1:4]
    tensors, results = load_file(src), {}
    what = {"loss": loss_case, "advantages": advantages_case, "masked": masked_case, "controller": controller_case}
    for case, s in json.load(open(settings)).items():
        x = {k.split("/", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{case}/")}
        for k, t in what[s["what"]](x, s).items():
            results[f"{case}/{k}"] = t.contiguous().clone()
    save_file(results, dst)
