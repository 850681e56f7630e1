"""Adapters of the Rust model against peft, on models that the Rust side wrote.

lora.py make DIR SEED   for each DIR/<family> with base/ and inputs.st: writes an adapter made by peft (peft/) and its logits (peft.st)
lora.py check DIR       for each DIR/<family>: loads ours/ with peft and merged/ with transformers; prints relative differences to ours.st as JSON
"""

import json
import pathlib
import random
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
IMAGE = 3


def load(path):
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def logits(model, inputs):
    ids = inputs["input_ids"]
    out = model(
        input_ids=ids, mm_token_type_ids=(ids == IMAGE).int(), pixel_values=inputs["pixel_values"],
        image_grid_thw=inputs["image_grid_thw"])
    return out.logits[0]


def gap(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def make(path, rng):
    model = load(path / "base")
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
    visual = rng.sample([n for n in names if ".visual." in n], 3)
    decoder = rng.sample([n for n in names if ".visual." not in n], 6)
    rank = rng.randint(1, 6)
    peft = get_peft_model(model, LoraConfig(
        r=rank, lora_alpha=rng.choice([3, 8, 16]), use_rslora=rng.random() < 0.5, target_modules=visual + decoder))
    for module in peft.modules():
        if hasattr(module, "lora_B"):
            # The adapter's contribution is about as large as the weights, whatever the scale: rounding errors would grow with it.
            a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
            a.data.copy_(torch.randn(a.shape) * 0.2)
            b.data.copy_(torch.randn(b.shape) * 0.2 / module.scaling["default"])
    peft.save_pretrained(path / "peft")
    save_file({"logits": logits(peft, load_file(path / "inputs.st")).contiguous()}, path / "peft.st")


def check(path):
    inputs, ours = load_file(path / "inputs.st"), load_file(path / "ours.st")["logits"]
    peft = PeftModel.from_pretrained(load(path / "base"), path / "ours")
    weights = load_peft_weights(path / "ours")
    info = set_peft_model_state_dict(peft, weights)
    missing = [k for k in info.missing_keys if "lora_" in k]
    held = get_peft_model_state_dict(peft)
    assert not missing and not info.unexpected_keys, (missing, info.unexpected_keys)
    assert set(held) == set(weights), set(held) ^ set(weights)
    assert all(torch.equal(held[k], weights[k]) for k in held)
    out = {"peft": gap(logits(peft, inputs), ours)}
    base = load(path / "base")
    out["moved"] = gap(logits(base, inputs), ours)
    merged, found = AutoModelForImageTextToText.from_pretrained(
        path / "merged", dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(found.values()), found
    out["merged"] = gap(logits(merged.eval(), inputs), ours)
    return out


command, root = sys.argv[1], pathlib.Path(sys.argv[2])
families = sorted(p for p in root.iterdir() if (p / "base").exists())
if command == "make":
    rng = random.Random(int(sys.argv[3]))
    torch.manual_seed(rng.randrange(2**31))
    for path in families:
        make(path, rng)
else:
    print(json.dumps({p.name: check(p) for p in families}))
