"""Model shapes of the benchmarks as Hugging Face directories with random weights, and their prompts.

Shapes keep the proportions of the published family: a vision tower of a fifth to a quarter of all parameters, few
key/value heads, a gated MLP several times as wide as the residual stream, 14-pixel patches merged 2 x 2, 112-pixel windows.
`tiny` is the preset of the same name, with patches of 8 pixels and windows of 32.

    tiny    1,060,000 parameters   decoder 128 wide, 4 layers; vision tower 64 wide, 3 blocks
    6m      6,112,896 parameters   decoder 192 wide, 8 layers; vision tower 128 wide, 5 blocks
    100m  101,023,360 parameters   decoder 640 wide, 10 layers; vision tower 384 wide, 10 blocks
    45m-deep and 135m-wide   24 narrow and 4 wide decoder layers
    3b  3,754,622,976 parameters   the published 3B configuration
    7b  8,292,166,656 parameters   the published 7B configuration

Weights are wide enough that attention and logits differ from token to token. Directories are written shard by shard, so that
only one shard is in memory; they are kept under target/bench/models.
"""

import json
import os
import pathlib
import shutil

import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
ROOT = pathlib.Path(__file__).resolve().parents[2]
OUT = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "bench"
RECIPE = 3  # increase when the written content changes
SHARD_BYTES = 5_000_000_000

# vocabulary, decoder (hidden, layers, heads, kv heads, intermediate, rotary section, rotary base), vision tower (hidden,
# depth, heads, intermediate, blocks with full attention), output matrix tied to the embedding
SHAPES = {
    "tiny": (512, (128, 4, 8, 4, 384, [2, 3, 3], 4.0), (64, 3, 2, 176, [2]), True),
    "6m": (4096, (192, 8, 6, 2, 640, [4, 6, 6], 1e6), (128, 5, 4, 384, [2, 4]), True),
    "100m": (32000, (640, 10, 10, 2, 2560, [8, 12, 12], 1e6), (384, 10, 6, 1024, [4, 9]), True),
    "45m-deep": (16000, (320, 24, 5, 1, 1024, [8, 12, 12], 1e6), (256, 6, 4, 640, [3, 5]), True),
    "135m-wide": (64000, (1024, 4, 16, 4, 3072, [8, 12, 12], 1e6), (512, 6, 8, 1536, [2, 5]), True),
    "3b": (151936, (2048, 36, 16, 2, 11008, [16, 24, 24], 1e6), (1280, 32, 16, 3420, [7, 15, 23, 31]), True),
    "7b": (152064, (3584, 28, 28, 4, 18944, [16, 24, 24], 1e6), (1280, 32, 16, 3420, [7, 15, 23, 31]), False),
}
PATCH = {"tiny": (8, 32)}  # side of a patch and of a window in pixels, if not the published 14 and 112
GRID = [1, 32, 32]  # patches of an image: 256 image tokens
TEXT_TOKENS = 30  # mean text tokens of a prompt


def config_of(shape):
    """Returns the shape as a configuration of transformers; the last ids of the vocabulary are the special tokens."""
    vocab, text, vision, tied = SHAPES[shape]
    hidden, layers, heads, kv, intermediate, section, theta = text
    patch, window = PATCH.get(shape, (14, 112))
    return Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=vocab, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv, max_position_embeddings=32768, rms_norm_eps=1e-6,
            bos_token_id=vocab - 1, eos_token_id=vocab - 2, pad_token_id=vocab - 1,
            rope_parameters={"rope_type": "default", "rope_theta": theta, "mrope_section": section}),
        vision_config=dict(
            hidden_size=vision[0], depth=vision[1], num_heads=vision[2], intermediate_size=vision[3],
            fullatt_block_indexes=vision[4], out_hidden_size=hidden, patch_size=patch, window_size=window,
            spatial_merge_size=2, temporal_patch_size=2),
        image_token_id=vocab - 3, video_token_id=vocab - 4, vision_start_token_id=vocab - 5,
        vision_end_token_id=vocab - 6, tie_word_embeddings=tied)


def tensors_of(config):
    """Returns published tensor names and shapes, in the order of the model."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    out = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)
        out[name] = tuple(value.shape)
    return out


def parameters(shape):
    """Returns the number of all parameters, including the vision tower; a tied output matrix counts once."""
    return sum(torch.Size(s).numel() for s in tensors_of(config_of(shape)).values())


class Noise:
    """Returns normally distributed numbers, cut from one random block: cheap for billions of them."""

    def __init__(self, seed, dtype):
        generator = torch.Generator().manual_seed(seed)
        self.block = torch.randn((1 << 24) + 4099, generator=generator).to(dtype)
        self.at = 0

    def take(self, shape, scale):
        count = torch.Size(shape).numel()
        out = torch.empty(count, dtype=self.block.dtype)
        filled = 0
        while filled < count:
            part = min(count - filled, len(self.block) - self.at)
            torch.mul(self.block[self.at:self.at + part], scale, out=out[filled:filled + part])
            filled, self.at = filled + part, (self.at + part) % len(self.block)
        return out.view(shape)


def weight(name, shape, noise, hidden):
    """Returns a non-trivial tensor: norms and biases vary, matrices preserve the scale of activations."""
    if len(shape) == 1:
        bias = name.endswith(".bias")
        return noise.take(shape, 0.2) + (0 if bias else 1)
    if "embed_tokens" in name or name.startswith("lm_head"):
        return noise.take(shape, 3 / hidden**0.5)
    # Wide enough that the most probable tokens vary, narrow enough that fp32 rounding does not decide between them.
    gain = 1.0 if name.startswith("visual.") else 1.6
    return noise.take(shape, gain / torch.Size(shape[1:]).numel()**0.5)


def make(shape, dtype):
    """Returns the directory of a shape in a dtype; written on first use."""
    final = OUT / "models" / f"{shape}-{dtype}"
    stamp = json.dumps([RECIPE, SHAPES[shape], dtype])
    if (final / "recipe.json").exists() and (final / "recipe.json").read_text() == stamp:
        return final
    print(f"bench: writing {final}", flush=True)
    partial = final.with_name(f".{final.name}.partial")
    for old in (final, partial):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    config = config_of(shape)
    kind = getattr(torch, dtype)
    config.dtype = kind
    write_shards(partial, tensors_of(config), Noise(7, kind), kind, config.text_config.hidden_size)
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(partial)
    (partial / "recipe.json").write_text(stamp)
    partial.rename(final)
    return final


def write_shards(where, tensors, noise, kind, hidden):
    """Writes shards of at most SHARD_BYTES and their index, or a single model.safetensors if it fits."""
    shards, size = [[]], 0
    for name, shape in tensors.items():
        own = torch.Size(shape).numel() * kind.itemsize
        if shards[-1] and size + own > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += own
    files, total = {}, 0
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        values = {name: weight(name, tensors[name], noise, hidden) for name in names}
        total += sum(v.nbytes for v in values.values())
        save_file(values, where / file, metadata={"format": "pt"})
        del values
        files.update(dict.fromkeys(names, file))
        with open(where / file, "rb+") as written:
            os.fsync(written.fileno())
    if len(shards) > 1:
        (where / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=1))


def prompts(shape, count):
    """Writes a safetensors file with `count` prompts: one image of 256 tokens and about 30 text tokens, varying in number."""
    config = config_of(shape)
    path = OUT / "models" / f"{shape}-prompts-{count}.safetensors"
    generator = torch.Generator().manual_seed(11)
    top = config.vision_end_token_id
    image = [config.vision_start_token_id] + [config.image_token_id] * (GRID[1] * GRID[2] // 4) + [top]
    tensors = {}
    for index in range(count):
        text = TEXT_TOKENS + (index % 4) * 2 - 3 - 2
        ids = torch.randint(0, top, (text,), generator=generator).tolist()
        tensors[f"{index:03}.tokens"] = torch.tensor(ids[:8] + image + ids[8:])
        tensors[f"{index:03}.pixels"] = torch.randn(
            GRID[1] * GRID[2], 3 * 2 * config.vision_config.patch_size**2, generator=generator)
    tensors["grid"] = torch.tensor(GRID)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)
    return path


def decoder_parameters(shape):
    """Returns the number of parameters read by a decode step: all but the vision tower; the embedding only if it is the output matrix."""
    config = config_of(shape)
    skip = "visual." if config.tie_word_embeddings else ("visual.", "model.embed_tokens.")
    return sum(torch.Size(s).numel() for name, s in tensors_of(config).items() if not name.startswith(skip))
