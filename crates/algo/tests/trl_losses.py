"""TRL's own GRPO loss and its gradients: `GRPOTrainer._compute_loss` on a stand-in that provides log-probabilities instead of a model.
Usage: trl_losses.py IN.safetensors OUT.safetensors SETTINGS.json; settings and tensors by case, tensors as `case/key`."""
import collections
import json
import sys
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from trl.trainer.grpo_trainer import GRPOTrainer

torch.set_num_threads(1)


def padded(t, lengths):
    return pad_sequence(torch.split(t, lengths), batch_first=True)


def ratio_of(old, behaviour, s):
    """The ratio that TRL's rollout phase passes to the loss in the mode of that name."""
    w = torch.exp(old - behaviour)
    if s["correction"] == "token_truncate":
        return torch.clamp(w, max=s["cap"])
    return w.masked_fill((w < 1 / s["cap"]) | (w > s["cap"]), 0.0)


def loss_of(x, s):
    lengths = [n for group in s["lengths"] for n in group]
    leaf = {k: x[k].clone().requires_grad_(True) for k in ("logprobs", "entropy")}
    mask = padded(torch.ones(sum(lengths), dtype=torch.double), lengths)
    same = lambda t, **_: t  # noqa: E731
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (padded(leaf["logprobs"], lengths), padded(leaf["entropy"], lengths), None),
        loss_type=s["loss_type"], epsilon_low=s["epsilon_low"], epsilon_high=s["epsilon_high"], beta=s["beta"],
        importance_sampling_level=s["level"], max_completion_length=s["max_completion_length"],
        use_vllm=s["correction"] != "none", vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled=s["entropy_coef"] != 0, entropy_coef=s["entropy_coef"], use_adaptive_entropy=False,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, aux_loss_enabled=False,
        current_gradient_accumulation_steps=1, model=SimpleNamespace(training=True),
        args=SimpleNamespace(delta=s["delta"], use_bias_correction_kl=False, steps_per_generation=1),
        accelerator=SimpleNamespace(num_processes=1, gather=same, reduce=same, sync_gradients=True),
        _metrics=collections.defaultdict(lambda: collections.defaultdict(list)),
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1] + 1, "completion_ids": ids, "completion_mask": mask,
        "advantages": padded(x["advantages"], lengths), "old_per_token_logps": padded(x["old"], lengths),
        "ref_per_token_logps": padded(x["reference"], lengths), "num_items_in_batch": mask.sum(),
    }
    if trainer.use_vllm:
        inputs["importance_sampling_ratio"] = padded(ratio_of(x["old"], x["behaviour"], s), lengths)
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    grad = {f"grad_{k}": torch.zeros_like(t) if t.grad is None else t.grad for k, t in leaf.items()}
    return {"loss": loss.detach().reshape(1), **grad}


if __name__ == "__main__":
    src, dst, settings = sys.argv[1:4]
    tensors, results = load_file(src), {}
    for case, s in json.load(open(settings)).items():
        x = {k.split("/", 1)[1]: t for k, t in tensors.items() if k.startswith(f"{case}/")}
        for k, t in loss_of(x, s).items():
            results[f"{case}/{k}"] = t.contiguous().clone()
    save_file(results, dst)
