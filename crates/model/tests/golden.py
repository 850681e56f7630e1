"""Reference numbers from transformers for the Rust model.

golden.py make DIR      random tiny models with inputs and what transformers makes of them: DIR/<model>/…
golden.py check DIR     directories DIR/<model>/rust written by the Rust side give the same logits; prints JSON
"""

import json
import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
IMAGE, VIDEO, START, END, EOS = 3, 4, 5, 6, 1
SUPPRESS = [IMAGE, VIDEO, START, END, EOS]
NEW = 24

# name, text (hidden, layers, heads, kv, intermediate, section, eps), vision (hidden, depth, heads, intermediate, patch,
# window, full), tied, inputs as lists of image grids (h, w in patches)
MODELS = [
    ("plain", (64, 2, 4, 2, 96, [2, 3, 3], 1e-6), (32, 2, 2, 48, 8, 48, [1]), True,
     [[(12, 12)], [(8, 14)], [(4, 6), (12, 12)], []]),
    ("deep", (96, 5, 6, 3, 160, [4, 2, 2], 1e-5), (48, 4, 4, 80, 14, 112, [1, 3]), False,
     [[(16, 10)], [(18, 6), (8, 8), (16, 10)], [(2, 2)]]),
    ("wide", (128, 3, 4, 1, 128, [4, 6, 6], 1e-6), (64, 3, 4, 96, 8, 32, []), True,
     [[(10, 6)], [(8, 8), (8, 8)], [(2, 20)]]),
    ("full", (80, 4, 5, 5, 120, [2, 2, 4], 1e-6), (40, 2, 5, 64, 4, 16, [0, 1]), False,
     [[(6, 22)], [(14, 6), (6, 14)]]),
]


def config_of(text, vision, tied):
    hidden, layers, heads, kv, intermediate, section, eps = text
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=211, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=512, rms_norm_eps=eps,
            bos_token_id=0, eos_token_id=EOS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}),
        vision_config=dict(
            depth=vision[1], hidden_size=vision[0], intermediate_size=vision[3], num_heads=vision[2],
            patch_size=vision[4], window_size=vision[5], out_hidden_size=hidden, fullatt_block_indexes=vision[6]),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END,
        tie_word_embeddings=tied)


def inputs_of(config, grids, generator):
    vision = config.vision_config
    ids, pixels = torch.randint(10, 211, (3,), generator=generator).tolist(), []
    for h, w in grids:
        ids += [START] + [IMAGE] * (h * w // 4) + [END] + torch.randint(10, 211, (2,), generator=generator).tolist()
        pixels.append(torch.randn(h * w, 3 * 2 * vision.patch_size**2, generator=generator))
    ids += torch.randint(10, 211, (4,), generator=generator).tolist()
    out = {"input_ids": torch.tensor([ids])}
    out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).int()
    if grids:
        out["pixel_values"] = torch.cat(pixels)
        out["image_grid_thw"] = torch.tensor([[1, h, w] for h, w in grids])
    return out


def full_inputs(inputs, sequence):
    out = dict(inputs, input_ids=sequence, mm_token_type_ids=(sequence == IMAGE).int())
    return out


@torch.no_grad()
def make(root):
    for seed, (name, text, vision, tied, cases) in enumerate(MODELS):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        config = config_of(text, vision, tied)
        config._attn_implementation = "eager"
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
        for key, value in model.named_parameters():
            # Wide enough for attention and logits that differ from token to token, biases and norms that matter.
            if value.ndim == 1:
                value.add_(torch.randn(value.shape, generator=generator) * 0.2)
            elif "embed_tokens" in key or "lm_head" in key:
                value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
            else:
                fan_in = value[0].numel()
                value.copy_(torch.randn(value.shape, generator=generator) * 1.2 / fan_in**0.5)
        model.save_pretrained(root / name)
        layer = config.text_config.num_hidden_layers * 2 // 3
        tensors, listed = {}, []
        for index, grids in enumerate(cases):
            inputs = inputs_of(config, grids, generator)
            prompt = inputs["input_ids"].shape[1]
            model.model.rope_deltas = None
            sequence = model.generate(
                **inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=SUPPRESS)
            model.model.rope_deltas = None
            out = model(**full_inputs(inputs, sequence), output_attentions=True)
            tensors[f"{index}.tokens"] = sequence[0].contiguous()
            tensors[f"{index}.logits"] = out.logits[0].contiguous()
            if grids:
                tensors[f"{index}.pixels"] = inputs["pixel_values"]
                rows = out.attentions[layer][0][:, prompt:, sequence[0] == IMAGE]
                tensors[f"{index}.attention"] = (rows / rows.sum(-1, keepdim=True)).mean(0).contiguous()
            listed.append({"prompt": prompt, "grids": [[1, h, w] for h, w in grids]})
        save_file(tensors, root / name / "golden.st")
        (root / name / "golden.json").write_text(json.dumps(
            {"layer": layer, "suppress": SUPPRESS, "cases": listed}))
    (root / "models.json").write_text(json.dumps([m[0] for m in MODELS]))


@torch.no_grad()
def check(root):
    report = {}
    for name in json.loads((root / "models.json").read_text()):
        model = AutoModelForImageTextToText.from_pretrained(
            root / name / "rust", dtype=torch.float32, attn_implementation="eager").eval()
        gold = load_file(root / name / "golden.st")
        worst = 0.0
        for index, case in enumerate(json.loads((root / name / "golden.json").read_text())["cases"]):
            sequence = gold[f"{index}.tokens"][None]
            inputs = {"input_ids": sequence, "mm_token_type_ids": (sequence == IMAGE).int()}
            if case["grids"]:
                inputs["pixel_values"] = gold[f"{index}.pixels"]
                inputs["image_grid_thw"] = torch.tensor(case["grids"])
            model.model.rope_deltas = None
            worst = max(worst, (model(**inputs).logits[0] - gold[f"{index}.logits"]).abs().max().item())
        report[name] = worst
    # A model from scratch: every tensor is there, none is left over.
    _, info = AutoModelForImageTextToText.from_pretrained(root / "fresh", output_loading_info=True)
    report["fresh"] = {key: sorted(map(str, value)) for key, value in info.items() if value}
    print(json.dumps(report))


{"make": make, "check": check}[sys.argv[1]](pathlib.Path(sys.argv[2]))
