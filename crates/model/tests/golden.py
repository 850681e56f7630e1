"""Reference values from transformers for the Rust model.

golden.py make DIR [SEED]   random tiny models of each family with inputs and transformers' outputs: DIR/<model>/…
golden.py check DIR         compares the logits of directories DIR/<model>/rust, written by the Rust side; prints JSON
"""

import contextlib
import json
import pathlib
import random
import sys

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.utils import logging

logging.set_verbosity_error()
torch.set_num_threads(1)
IMAGE, VIDEO, START, END, EOS = 3, 4, 5, 6, 1
SUPPRESS = [IMAGE, VIDEO, START, END, EOS]
NEW = 64
PER_FAMILY = 4
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)


def split(rng, total, least=(1, 1, 1)):
    """Three numbers that sum to total."""
    left = total - sum(least)
    a = rng.randint(0, left)
    b = rng.randint(0, left - a)
    return [least[0] + a, least[1] + b, least[2] + left - a - b]


def text_of(rng, head_dim, section, own_head=False):
    kv = rng.choice([1, 2, 3])
    heads = kv * rng.choice([1, 2, 4])
    hidden = rng.choice([48, 64, 80]) if own_head else heads * head_dim
    more = {"head_dim": head_dim} if own_head else {}
    return dict(
        vocab_size=211, hidden_size=hidden, intermediate_size=rng.choice([96, 120, 160]),
        num_hidden_layers=rng.randint(2, 5), num_attention_heads=heads, num_key_value_heads=kv,
        max_position_embeddings=1024, rms_norm_eps=rng.choice([1e-5, 1e-6]), bos_token_id=0, eos_token_id=EOS,
        rope_parameters={"rope_type": "default", "rope_theta": rng.choice([1e4, 1e6]), "mrope_section": section}, **more)


def vision_of(rng, hidden):
    heads = rng.choice([2, 3, 4])
    return dict(
        depth=rng.randint(2, 4), hidden_size=heads * rng.choice([8, 12, 16]), intermediate_size=rng.choice([48, 64, 80]),
        num_heads=heads, patch_size=rng.choice([4, 8, 14]), out_hidden_size=hidden)


def qwen2_5_vl(rng):
    head_dim = rng.choice([16, 24, 32])
    text = text_of(rng, head_dim, split(rng, head_dim // 2))
    vision = vision_of(rng, text["hidden_size"])
    vision["window_size"] = vision["patch_size"] * rng.choice([2, 4, 6, 8])
    vision["fullatt_block_indexes"] = sorted(rng.sample(range(vision["depth"]), rng.randint(0, vision["depth"])))
    config = Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, tie_word_embeddings=rng.random() < 0.5, **IDS)
    return Qwen2_5_VLForConditionalGeneration, config


def qwen3_vl(rng):
    head_dim = rng.choice([16, 24, 32])
    # The axes interleave, so the temporal section must not be the smallest.
    third = head_dim // 6
    h, w = rng.randint(1, third), rng.randint(1, third)
    text = text_of(rng, head_dim, [head_dim // 2 - h - w, h, w], own_head=True)
    text["rope_parameters"]["mrope_interleaved"] = True
    vision = vision_of(rng, text["hidden_size"])
    vision["num_position_embeddings"] = rng.choice([4, 7, 12]) ** 2
    levels = rng.randint(0, min(vision["depth"], text["num_hidden_layers"]))
    vision["deepstack_visual_indexes"] = sorted(rng.sample(range(vision["depth"]), levels))
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=rng.random() < 0.5, **IDS)
    return Qwen3VLForConditionalGeneration, config


def grids_of(rng):
    """Images of one to three inputs and one input without: sizes in patches, some very wide or tall."""
    side = lambda: 2 * rng.choice([1, 2, 3, 4, 5, 7, 9])
    image = lambda: rng.choice([(side(), side()), (2, side() * 2), (side() * 2, 2)])
    return [[image()], [image() for _ in range(rng.randint(2, 3))], [image()], []]


def inputs_of(config, grids, generator):
    vision = config.vision_config
    text = lambda n: torch.randint(10, 211, (n,), generator=generator).tolist()
    ids, pixels = text(int(torch.randint(1, 12, (1,), generator=generator))), []
    for h, w in grids:
        ids += [START] + [IMAGE] * (h * w // 4) + [END] + text(2)
        pixels.append(torch.randn(h * w, 3 * 2 * vision.patch_size**2, generator=generator))
    ids += text(4)
    out = {"input_ids": torch.tensor([ids])}
    out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).int()
    if grids:
        out["pixel_values"] = torch.cat(pixels)
        out["image_grid_thw"] = torch.tensor([[1, h, w] for h, w in grids])
    return out


def full_inputs(inputs, sequence):
    out = dict(inputs, input_ids=sequence, mm_token_type_ids=(sequence == IMAGE).int())
    return out


def attention_set(rng, config):
    """Whole layers and single heads, as pairs (layer, head), besides the default layer."""
    layers, heads = config.text_config.num_hidden_layers, config.text_config.num_attention_heads
    whole = sorted(rng.sample(range(layers), rng.randint(1, layers - 1)))
    single = [[rng.randrange(layers), rng.randrange(heads)] for _ in range(rng.randint(0, 3))]
    pairs = {(layer, head) for layer in whole for head in range(heads)} | {(a, b) for a, b in single}
    return whole, single, sorted(pairs)


def rows_over_images(attentions, pairs, prompt, image):
    rows = []
    for layer, head in pairs:
        row = attentions[layer][0, head, prompt:, image]
        rows.append(row / row.sum(-1, keepdim=True))
    return torch.stack(rows).mean(0).contiguous()


def rows_of_heads(attentions, prompt, image):
    """Two sets of response tokens, and the mean of their rows for every layer and head: [2, layers, heads, V]."""
    rows = torch.stack([layer[0][:, prompt:, image] for layer in attentions])
    rows = rows / rows.sum(-1, keepdim=True)
    rng = random.Random(prompt)
    tokens = [sorted(rng.sample(range(rows.shape[2]), n)) for n in (1, rng.randint(2, 6))]
    return tokens, torch.stack([rows[:, :, t].mean(2) for t in tokens]).contiguous()


def rounded(t):
    return t.bfloat16().float()


@contextlib.contextmanager
def rounded_operands():
    """The fast mode: operands of linear layers and of attention are rounded to bf16, everything else is fp32."""
    plain = F.linear
    modules = [(module, module.eager_attention_forward) for module in (modeling_qwen2_5_vl, modeling_qwen3_vl)]

    def linear(x, weight, bias=None):
        out = plain(rounded(x), rounded(weight))
        return out if bias is None else out + bias

    def attention(eager):
        return lambda module, q, k, v, *args, **more: eager(module, rounded(q), rounded(k), rounded(v), *args, **more)

    F.linear = linear
    for module, eager in modules:
        module.eager_attention_forward = attention(eager)
    try:
        yield
    finally:
        F.linear = plain
        for module, eager in modules:
            module.eager_attention_forward = eager


@torch.no_grad()
def make(root, seed=0):
    rng = random.Random(seed)
    names = []
    for family in (qwen2_5_vl, qwen3_vl):
        for number in range(PER_FAMILY):
            names.append(f"{family.__name__}-{number}")
            torch.manual_seed(seed * 100 + len(names))
            make_model(root / names[-1], rng, *family(rng))
    for family in (qwen2_5_vl, qwen3_vl):
        names.append(f"{family.__name__}-head")
        torch.manual_seed(seed * 100 + len(names))
        kind, config = family(rng)
        config.tie_word_embeddings = True
        make_model(root / names[-1], rng, kind, config, head=True)
    (root / "models.json").write_text(json.dumps(names))


def make_model(path, rng, kind, config, head=False):
    """With `head` the files contain a separate output matrix although the configuration ties it."""
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    config._attn_implementation = "eager"
    model = kind(config).eval()
    for key, value in model.named_parameters():
        # Large enough for attention and logits that differ between tokens, and for biases and norms that matter.
        if value.ndim == 1:
            value.add_(torch.randn(value.shape, generator=generator) * 0.2)
        elif "embed" in key and "patch" not in key or "lm_head" in key:
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
        else:
            fan_in = value[0].numel()
            value.copy_(torch.randn(value.shape, generator=generator) * 1.2 / fan_in**0.5)
    model.save_pretrained(path)
    if head:
        tensors = load_file(path / "model.safetensors")
        assert "lm_head.weight" not in tensors
        tensors["lm_head.weight"] = torch.randn(model.lm_head.weight.shape, generator=generator) * 0.2
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
        assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])
    layer = config.text_config.num_hidden_layers * 2 // 3
    heads = config.text_config.num_attention_heads
    whole, single, pairs = attention_set(rng, config)
    tensors, listed = {}, []
    for index, grids in enumerate(grids_of(rng)):
        inputs = inputs_of(config, grids, generator)
        prompt = inputs["input_ids"].shape[1]
        model.model.rope_deltas = None
        sequence = model.generate(
            **inputs, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, suppress_tokens=SUPPRESS)
        model.model.rope_deltas = None
        out = model(**full_inputs(inputs, sequence), output_attentions=True)
        tensors[f"{index}.tokens"] = sequence[0].contiguous()
        tensors[f"{index}.logits"] = out.logits[0].contiguous()
        if not grids:
            with rounded_operands():
                tensors[f"{index}.fast"] = model(**full_inputs(inputs, sequence)).logits[0].contiguous()
        tokens = None
        if grids:
            tensors[f"{index}.pixels"] = inputs["pixel_values"]
            image = sequence[0] == IMAGE
            default = [(layer, head) for head in range(heads)]
            tensors[f"{index}.attention"] = rows_over_images(out.attentions, default, prompt, image)
            tensors[f"{index}.attention_set"] = rows_over_images(out.attentions, pairs, prompt, image)
            tokens, tensors[f"{index}.heads"] = rows_of_heads(out.attentions, prompt, image)
        listed.append({"prompt": prompt, "grids": [[1, h, w] for h, w in grids], "tokens": tokens})
    save_file(tensors, path / "golden.st")
    (path / "golden.json").write_text(json.dumps(
        {"layer": layer, "layers": whole, "heads": single, "suppress": SUPPRESS, "cases": listed}))


@torch.no_grad()
def check(root):
    report = {"version": transformers.__version__}
    kinds = {} if transformers.__version__.startswith("4.") else {"mm_token_type_ids": True}
    for name in json.loads((root / "models.json").read_text()) + ["published"]:
        model = AutoModelForImageTextToText.from_pretrained(
            root / name / "rust", dtype=torch.float32, attn_implementation="eager").eval()
        gold = load_file(root / name / "golden.st")
        worst = 0.0
        for index, case in enumerate(json.loads((root / name / "golden.json").read_text())["cases"]):
            sequence = gold[f"{index}.tokens"][None]
            inputs = {"input_ids": sequence, **{key: (sequence == IMAGE).int() for key in kinds}}
            if case["grids"]:
                inputs["pixel_values"] = gold[f"{index}.pixels"]
                inputs["image_grid_thw"] = torch.tensor(case["grids"])
            model.model.rope_deltas = None
            worst = max(worst, (model(**inputs).logits[0] - gold[f"{index}.logits"]).abs().max().item())
        report[name] = worst
    # Models from scratch: no tensor is missing or unused.
    for fresh in sorted(root.glob("fresh-*")):
        _, info = AutoModelForImageTextToText.from_pretrained(fresh, output_loading_info=True)
        report[fresh.name] = {key: sorted(map(str, value)) for key, value in info.items() if value}
    print(json.dumps(report))


command, root = sys.argv[1], pathlib.Path(sys.argv[2])
if command == "make":
    make(root, *map(int, sys.argv[3:]))
else:
    check(root)
