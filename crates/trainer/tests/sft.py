"""Repeats the updates of stage 1 with padded rows on transformers' model: in a plain loop in PyTorch, and with TRL's SFTTrainer.

sft.py DIR    with base/ (the initial model), float64/, float64-packed/, float64-adapters/ and float32/ (written by the test in that dtype)

float64-adapters has adapter/, from which peft trains adapters beside a whole module, and merged/ and trained/, our model with the adapters
merged and the adapters in peft's format, which must both equal what peft ends with.

In float64 losses, gradient norms, gradients and changes of weights must equal those of the plain loop within 1e-9 (by norm, per tensor).
TRL computes log-probabilities in float32 alone, where the first steps of AdamW are the sign of a gradient that is near 0. There, losses may
deviate by 1e-5, and the changes of all weights together, compared with those in float64, by 1e-4 more than twice TRL's. There is no weight
decay, because transformers' trainer decays some norms of the vision tower.
"""

import json
import pathlib
import sys

import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

root = pathlib.Path(sys.argv[1])


def whole_precision(model):
    """Removes casts to float32 from the model's code; rotary frequencies remain float32 values, rounded once."""
    def norm(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            type(module).forward = norm
        if hasattr(module, "inv_freq"):
            n = 2 * len(module.inv_freq)
            theta = module.config.rope_parameters["rope_theta"]
            exact = 1.0 / theta ** (torch.arange(0, n, 2, dtype=torch.float64) / n)
            assert (exact - module.inv_freq.double()).abs().max() < 1e-6, type(module)
            module.inv_freq = exact.to(torch.float32)


def keep_double():
    """Makes Tensor.float leave float64 tensors as they are."""
    plain = torch.Tensor.float
    torch.Tensor.float = lambda t: t if t.dtype == torch.float64 else plain(t)


class Run:
    """What our trainer did in one dtype, and the same batches as padded rows."""

    def __init__(self, name):
        self.dir = root / name
        self.dtype = getattr(torch, name.split("-")[0])
        self.result = json.loads((self.dir / "result.json").read_text())
        self.pixels = load_file(self.dir / "pixels.safetensors")
        self.gradients = load_file(self.dir / "gradients.safetensors")
        self.weights = load_file(self.dir / "weights.safetensors")
        self.options = self.result["optimizer"]

    def model(self):
        model = AutoModelForImageTextToText.from_pretrained(root / "base", dtype=self.dtype, attn_implementation="sdpa")
        if self.dtype == torch.float64:
            whole_precision(model)
        # The embedding would otherwise exclude the padding token from its gradient.
        model.get_input_embeddings().padding_idx = None
        if (self.dir / "adapter").exists():
            model = PeftModel.from_pretrained(model, self.dir / "adapter", is_trainable=True)
        return model

    def batch(self, step):
        samples = [s for s in self.result["samples"] if s["step"] == step]
        longest = max(len(s["prompt"]) + len(s["answer"]) for s in samples)
        rows = dict(input_ids=[], attention_mask=[], labels=[])
        for s in samples:
            full, rest = s["prompt"] + s["answer"], longest - len(s["prompt"]) - len(s["answer"])
            rows["input_ids"].append(full + [0] * rest)
            rows["attention_mask"].append([1] * len(full) + [0] * rest)
            rows["labels"].append([-100] * len(s["prompt"]) + s["answer"] + [-100] * rest)
        out = {k: torch.tensor(v) for k, v in rows.items()}
        def stack(key):
            names = [f"{step}.{s['index']}.{key}" for s in samples]
            return torch.cat([self.pixels[n] for n in names if n in self.pixels])
        out["pixel_values"] = stack("pixel_values").to(self.dtype)
        out["image_grid_thw"] = stack("image_grid_thw")
        return out


def with_types(model, batch):
    return {**batch, "mm_token_type_ids": (batch["input_ids"] == model.config.image_token_id).int()}


def load_model(directory):
    """Returns the weights of a model directory by our names."""
    named = {}
    for file in directory.glob("*.safetensors"):
        named.update(load_file(file))
    return {ours(n): t for n, t in named.items()}


def ours(name):
    """Returns the name of a parameter in our files."""
    name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "").replace(".default", "")
    name = name.removeprefix("model.") if name.startswith("model.visual.") else name
    return name.replace("model.language_model.", "model.")


def compare_updates(what, run, updates, of_loss):
    """Compares losses and gradient norms."""
    for i, (mine, theirs) in enumerate(zip(run.result["updates"], updates, strict=True)):
        for key, value in theirs.items():
            limit = of_loss if key == "loss" else 10 * of_loss
            assert abs(mine[key] - value) <= limit * abs(value), f"{what}, update {i}: {key} {mine[key]}, wanted {value}"


def weights(model):
    return {ours(n): p.detach().double() for n, p in model.named_parameters() if p.requires_grad}


def difference(before, mine, theirs):
    """Returns the norm of the difference of two changes of all weights, relative to the second."""
    off = sum((mine[n].double() - theirs[n]).norm().item() ** 2 for n in before)
    return (off / sum((theirs[n] - before[n]).norm().item() ** 2 for n in before)) ** 0.5


def compare_exactly(what, run, updates, gradients, model):
    """Compares losses, norms, the gradients of the last update and the change of each weight with those of `run`."""
    compare_updates(what, run, updates, 1e-9)
    before, after = weights(run.model()), weights(model)
    for name, value in after.items():
        pairs = dict(change=(run.weights[name] - before[name], value - before[name]), gradient=(run.gradients[name], gradients[name]))
        for kind, (mine, theirs) in pairs.items():
            off, size = (mine - theirs).norm().item(), theirs.norm().item()
            assert off <= 1e-9 * size + 1e-14, f"{what}: the {kind} of {name} is {off:.1e} of {size:.1e} away"
    print(f"{what}: equal, the change of all weights within {difference(before, run.weights, after):.1e}")


def plain_loop(run):
    """Trains in PyTorch: the mean cross-entropy over the answer tokens, clipping, AdamW with decay of matrices only."""
    model = run.model().eval()
    o = run.options
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim >= 2]
    vectors = [p for p in trained if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=o["weight_decay"]), dict(params=vectors, weight_decay=0.0)]
    adam = torch.optim.AdamW(groups, lr=o["lr"], betas=o["betas"], eps=o["eps"])
    updates, gradients = [], {}
    for step in range(o["updates"]):
        batch = with_types(model, run.batch(step))
        labels = batch.pop("labels")[:, 1:]
        logits = model(**batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        adam.zero_grad()
        loss.backward()
        gradients = {ours(n): p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        norm = torch.nn.utils.clip_grad_norm_(trained, o["clip_norm"])
        adam.step()
        updates.append(dict(loss=loss.item(), grad_norm=norm.item(), tokens=(labels >= 0).sum().item()))
    return updates, gradients, model


def trl(run):
    """Trains with TRL on the same batches, which its collator returns as they are."""
    model = run.model()
    o = run.options
    config = SFTConfig(
        output_dir=str(root / "trl"), max_steps=o["updates"], per_device_train_batch_size=1, learning_rate=o["lr"],
        lr_scheduler_type="constant", weight_decay=o["weight_decay"], max_grad_norm=o["clip_norm"], adam_beta1=o["betas"][0],
        adam_beta2=o["betas"][1], adam_epsilon=o["eps"], logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, bf16=False,
        fp16=False, gradient_checkpointing=False, remove_unused_columns=False, max_length=None, disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True}, optim="adamw_torch")
    data = Dataset.from_list([dict(step=i, input_ids=[0], labels=[0]) for i in range(o["updates"])])
    order = iter(range(o["updates"]))
    trainer = SFTTrainer(
        model=model, args=config, train_dataset=data, processing_class=AutoProcessor.from_pretrained(root / "base"),
        data_collator=lambda _: with_types(model, run.batch(next(order))))
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [dict(loss=float(entry["loss"]), grad_norm=float(entry["grad_norm"])) for entry in logs], trainer.model


double, packed, single = Run("float64"), Run("float64-packed"), Run("float32")
start = weights(single.model())
updates, model = trl(single)
theirs = weights(model)
compare_updates("float32 and TRL", single, updates, 1e-5)
keep_double()
updates, gradients, model = plain_loop(double)
compare_exactly("float64 padded and PyTorch", double, updates, gradients, model)
compare_exactly("float64 packed and PyTorch", packed, updates, gradients, model)

adapted = Run("float64-adapters")
updates, gradients, model = plain_loop(adapted)
assert any(".lora_A." in n for n in gradients) and any(n.startswith("visual.merger.") for n in gradients), gradients.keys()
compare_exactly("float64 adapters and peft", adapted, updates, gradients, model)
written = weights(PeftModel.from_pretrained(double.model(), adapted.dir / "trained", is_trainable=True))
for name, value in weights(model).items():
    assert (written[name] - value).norm() <= 1e-9 * value.norm() + 1e-14, f"peft reads another {name} from our files"
merged = {ours(n): p.detach() for n, p in model.merge_and_unload().named_parameters()}
for name, value in load_model(adapted.dir / "merged").items():
    assert (merged[name] - value).norm() <= 1e-9 * value.norm(), f"our merged {name} differs"

without_decay = Run("float64")
without_decay.options = single.options
exact = weights(plain_loop(without_decay)[2])
mine, other = difference(start, single.weights, exact), difference(start, theirs, exact)
assert other < 1e-3 and mine <= 1e-4 + 2 * other, f"float32 and TRL: changes are {mine:.1e} and {other:.1e} away from float64"
print(f"float32 and TRL: equal, changes within {mine:.1e} and {other:.1e} of float64")
