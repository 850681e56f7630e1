"""Recomputes the updates of dumped batches with padded copies, transformers, autograd and torch's AdamW.

replay.py DIR…    each with base/ (the initial model), dump/, out-float64/ and out-float32/ (written by replay in that dtype)

If there is an adapter/, peft trains it on the frozen base/ and merges it at the end.

In float64 our result must equal PyTorch's within 1e-9 per tensor by norm. PyTorch's float64 result then serves as the truth for both
float32 results, so that differences decided by rounding count against neither: ours may deviate by 1e-4 in a gradient, by 1e-3 in the
change of a weight (1e-5 in a part of the loss), and in the change of all weights together by at most 1e-4 plus twice the deviation of
PyTorch's own float32. The first step of AdamW is the sign of a gradient unless the gradient is as small as epsilon: there, and only there,
a change is as uncertain as the last digits of a gradient near 0, so this limit applies to all weights together. The worst values are
printed with their gradients.
"""

import gc
import json
import os
import pathlib
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration  # noqa: F401, imported before forks


def forked():
    """Returns a directory and a dtype in a new process each, because whole_precision changes classes; ends the program after all."""
    gc.freeze()  # else each process collects what was imported
    failed = []
    for root in map(pathlib.Path, sys.argv[1:]):
        for dtype in ("float64", "float32"):
            sys.stdout.flush()
            child = os.fork()
            if child == 0:
                return root, dtype
            if os.waitpid(child, 0)[1] != 0:
                failed.append(f"{root.name} in {dtype}")
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


root, dtype = forked()
label = f"{root.name} {dtype}"


def whole_precision(model):
    """Removes casts to float32 from the model's code; rotary frequencies remain float32 values, rounded once."""
    plain = torch.Tensor.float
    torch.Tensor.float = lambda t: t if t.dtype == torch.float64 else plain(t)

    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            type(module).forward = norm
        if hasattr(module, "inv_freq"):
            n = 2 * len(module.inv_freq)
            exact = 1.0 / module.config.rope_parameters["rope_theta"] ** (torch.arange(0, n, 2, dtype=torch.float64) / n)
            assert (exact - module.inv_freq.double()).abs().max() < 1e-6, type(module)
            module.inv_freq = exact.to(torch.float32)


dump = json.loads((root / "dump/batch.json").read_text())
pixels = load_file(root / "dump/batch.safetensors")
out = root / f"out-{dtype}"
result = json.loads((out / "replay.json").read_text())
s = dump["settings"]
a, optimizer = s["learner"], s["learner"]["optimizer"]
ppo = a["algorithm"] == "ppo"
DT = getattr(torch, dtype)
GRADIENT, CHANGE, PART = (1e-9, 1e-9, 1e-9) if DT == torch.float64 else (1e-4, 1e-3, 1e-5)
BESIDE = 1e-4
model = AutoModelForImageTextToText.from_pretrained(root / "base", dtype=DT, attn_implementation="sdpa").eval()
if DT == torch.float64:
    whole_precision(model)
# Random responses contain the padding token, whose row the embedding would otherwise exclude from its gradient.
model.get_input_embeddings().padding_idx = None
critic = None
if a["critic"] == "separate":
    critic = AutoModelForImageTextToText.from_pretrained(root / "base", dtype=DT, attn_implementation="sdpa").eval()
    if DT == torch.float64:
        whole_precision(critic)
    critic.get_input_embeddings().padding_idx = None
head = load_file(root / "base/value_head.safetensors") if ppo else {}
head = {k: v.to(DT).requires_grad_() for k, v in head.items()}
lora = (root / "adapter").exists()
if lora:
    model = PeftModel.from_pretrained(model, root / "adapter", is_trainable=True)
# Tokens that are never sampled: ids of the dump and the model's own vision tokens.
banned = torch.tensor(s["banned"])


def cut(r):
    """Returns whether the overlong filter leaves a response out of the loss."""
    return a["overlong_filter"] and r["finish"] == "length"


def rows(group):
    """Returns log-probabilities, entropies and values of each unmasked response, in a padded row with its own copy of the image."""
    i = dump["groups"].index(group)
    chosen = [r for r in group["responses"] if not r["masked"] and r["tokens"] and not cut(r)]
    if not chosen:
        return
    prompt, longest = group["prompt"], max(len(r["tokens"]) for r in chosen)
    ids = torch.tensor([prompt + r["tokens"] + [0] * (longest - len(r["tokens"])) for r in chosen])
    mask = torch.tensor([[1] * (len(prompt) + len(r["tokens"])) + [0] * (longest - len(r["tokens"])) for r in chosen])
    n = len(chosen)
    given = dict(
        input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == model.config.image_token_id).int(),
        pixel_values=pixels[f"{i:04}.pixel_values"].to(DT).repeat(n, 1),
        image_grid_thw=pixels[f"{i:04}.image_grid_thw"].repeat(n, 1), output_hidden_states=True)
    out = model(**given)
    states = (critic(**given) if critic else out).hidden_states[-1]
    logits = out.logits / s["temperature"]
    logits[..., banned] = -torch.inf
    logp = logits.log_softmax(-1)
    for k, r in enumerate(chosen):
        at = torch.arange(len(r["tokens"])) + len(prompt) - 1
        own = logp[k, at]
        finite = own.clamp(min=-1e4)
        values = None
        if ppo:
            values = states[k, at] @ head["value_head.weight"][0] + head["value_head.bias"][0]
        yield r, own.gather(-1, torch.tensor(r["tokens"])[:, None])[:, 0], -(finite.exp() * finite).sum(-1), values


def gae(reward, values):
    out, last, following = [], 0.0, 0.0
    for t in reversed(range(len(values))):
        delta = (reward if t + 1 == len(values) else 0.0) + a["gamma"] * following - values[t]
        last = delta + a["gamma"] * a["lambda"] * last
        following = values[t]
        out.insert(0, last)
    return torch.tensor(out, dtype=DT)


tokens = dict(logp=[], old=[], adv=[], ent=[], val=[], old_val=[], target=[])
for group in dump["groups"]:
    rewards = torch.tensor([r["reward"] for r in group["responses"] if not r["masked"]], dtype=torch.float64)
    spread = (rewards - rewards.mean()).abs().max() > 1e-9
    scale = rewards.std() + 1e-6 if a["scale_by_std"] else 1.0
    relative = (rewards - rewards.mean()) / scale * spread
    entering = [adv for r, adv in zip((r for r in group["responses"] if not r["masked"]), relative) if not cut(r)]
    for (r, logp, ent, values), adv in zip(rows(group), entering):
        tokens["logp"].append(logp)
        tokens["ent"].append(ent)
        tokens["old"].append(torch.tensor(r["logprobs"], dtype=DT))
        if ppo:
            old = torch.tensor(r["values"], dtype=DT)
            adv = gae(r["reward"], r["values"])
            tokens["val"].append(values)
            tokens["old_val"].append(old)
            tokens["target"].append(adv + old)
        tokens["adv"].append(adv.to(DT).expand(len(logp)))
t = {k: torch.cat(v) for k, v in tokens.items() if v}
if ppo:
    t["adv"] = (t["adv"] - t["adv"].mean()) / (t["adv"].var() + 1e-8).sqrt()

ratio = (t["logp"] - t["old"]).exp()
clipped = ratio.clamp(1 - a["clip_low"], 1 + a["clip_high"])
if a["surrogate"] == "cispo":
    policy = -(clipped.detach() * t["adv"] * t["logp"]).mean()
else:
    policy = -torch.minimum(ratio * t["adv"], clipped * t["adv"]).mean()
parts = {"policy": policy, "entropy": t["ent"].mean()}
loss = parts["policy"] - a["entropy_coef"] * parts["entropy"]
if ppo:
    near = t["old_val"] + (t["val"] - t["old_val"]).clamp(-a["value_clip"], a["value_clip"])
    parts["value"] = 0.5 * torch.maximum((t["val"] - t["target"]) ** 2, (near - t["target"]) ** 2).mean()
    loss = loss + a["value_coef"] * parts["value"]
named = {n: p for n, p in model.named_parameters() if p.requires_grad} | head
if critic:
    named |= {f"critic.{n}": p for n, p in critic.named_parameters()}
loss.backward()

faults, truth, seen = [], {}, []
exact = DT == torch.float64
if not exact:
    truth = load_file(root / "truth.safetensors")


def close(what, ours, theirs, tolerance):
    """Checks our deviation from the truth by norm; returns the squared norms of our and their deviation, and of the truth."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    if exact:
        truth[what] = theirs.clone().contiguous()
    size = truth[what].norm().item()
    off, peer = ((t - truth[what]).norm().item() for t in (ours, theirs))
    seen.append((off / (size + 1e-30), peer / (size + 1e-30), what))
    allowed = tolerance * size
    if off > allowed + 1e-12:
        faults.append(f"{what}: off by {off:.3e} of {size:.3e}, PyTorch's by {peer:.3e} (allowed {allowed:.3e})")
    return torch.tensor([off**2, peer**2, size**2], dtype=torch.float64)


scalar = torch.tensor
found = dict(result["parts"], entropy=result["entropy"], loss=result["loss"])
for name, value in dict(parts, loss=loss).items():
    if exact:
        truth[name] = value.detach().double()
    right = truth[name].item()
    if abs(found[name] - right) > PART * max(1.0, abs(right)):
        faults.append(f"{name}: {found[name]} is not {right}")
ours = load_file(out / "grads.safetensors")


def stored(name):
    """Returns the name of a parameter in files."""
    if name.startswith("critic."):
        found = stored(name.removeprefix("critic."))
        return found and f"critic.{found}"
    name = name.removeprefix("base_model.model.").replace(".default.", ".")
    tries = [name, name.replace("model.language_model.", "model."), name.replace("model.visual.", "visual.")]
    return next((n for n in tries if n in ours), None)


by_name = {stored(n): p for n, p in named.items() if stored(n) and p.grad is not None}
missing = set(ours) ^ set(by_name)
if missing or len(ours) < 20:
    faults.append(f"{len(ours)} gradients; names on one side only: {sorted(missing)[:4]}")
norm = torch.stack([p.grad.double().norm() for p in by_name.values()]).norm()
norm = truth.setdefault("gradient norm", norm).item()
if abs(norm - result["grad_norm"]) > GRADIENT * norm:
    faults.append(f"gradient norm: {result['grad_norm']} is not {norm}")
for name, p in by_name.items():
    close(f"gradient of {name}", ours[name], p.grad, GRADIENT)

before = {n: p.detach().clone() for n, p in by_name.items()}
torch.nn.utils.clip_grad_norm_(list(by_name.values()), optimizer["clip_norm"])
options = dict(lr=s["lr"], betas=tuple(optimizer["betas"]), eps=optimizer["eps"])
torch.optim.AdamW([
    dict(params=[p for p in by_name.values() if p.dim() >= 2], weight_decay=optimizer["weight_decay"]),
    dict(params=[p for p in by_name.values() if p.dim() < 2], weight_decay=0.0)], **options).step()
after = {}
for file in (out / "model").glob("*.safetensors"):
    after |= load_file(file)
if critic:
    after |= load_file(out / "critic.safetensors")
if lora:
    merged = model.merge_and_unload().state_dict()
    own = {n: n.replace("model.language_model.", "model.").replace("model.visual.", "visual.") for n in merged}
    touched = 0
    for n, w in merged.items():
        if own[n] in after:
            close(f"merged {own[n]}", after[own[n]].to(DT), w, GRADIENT)
            touched += 1
    if touched != len(after) - len(head):
        faults.append(f"{touched} of {len(after)} merged tensors are compared")
    after |= {stored(n): t for n, t in load_file(out / "adapter/adapter_model.safetensors").items()}
whole, worst = torch.zeros(3, dtype=torch.float64), []
for name, p in by_name.items():
    was = before[name].double()
    change = after[name].double() - was
    whole += close(f"change of {name}", change, p.detach().double() - was, CHANGE)
    gap = (change - truth[f"change of {name}"]).abs().flatten()
    at = gap.argmax()
    worst.append((gap[at].item(), name, truth[f"gradient of {name}"].flatten()[at].item()))
off, peer, size = whole.sqrt().tolist()
print(f"{label} change of all weights: ours is off by {off / size:.2e}, PyTorch's by {peer / size:.2e}")
if not exact and off > 2 * peer + BESIDE * size:
    faults.append(f"the change of all weights is off by {off:.3e} of {size:.3e}, PyTorch's by {peer:.3e}")
for gap, name, gradient in sorted(worst, reverse=True)[:3]:
    print(f"{label} {name}: the worst number is off by {gap:.2e}, where the gradient is {gradient:.2e}")
if exact:
    save_file(truth, root / "truth.safetensors")
for ours, theirs, what in sorted(seen, reverse=True)[:3]:
    print(f"{label} {what}: ours is off by {ours:.2e}, PyTorch's by {theirs:.2e}")
if faults:
    sys.exit(f"{label}: {len(faults)} differences:\n" + "\n".join(faults[:10]))
sys.stdout.flush()
os._exit(0)  # without the destruction of all modules
