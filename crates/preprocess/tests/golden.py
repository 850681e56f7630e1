"""Computes the results of transformers for the images, sizes and texts of a job, for tests/golden.rs.

Usage: golden.py JOB_DIR. Reads JOB_DIR/job.json, writes JOB_DIR/out.json and raw pixel files next to it.
"""

import json
import os
import sys

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

torch.set_num_threads(1)


def read_image(root, item):
    raw = np.fromfile(os.path.join(root, item["file"]), dtype=np.uint8)
    return Image.fromarray(raw.reshape(item["height"], item["width"], 3))


def images(root, job):
    out = []
    processors = {d: AutoImageProcessor.from_pretrained(os.path.join(root, d)) for d in job["processors"]}
    for d, p in processors.items():
        assert p.backend == "torchvision", p.backend
        for item in job["images"]:
            image = read_image(root, item)
            made = p(images=[image], return_tensors="pt")
            name = f"{d}-{item['file']}"
            made["pixel_values"].numpy().astype("<f4").tofile(os.path.join(root, name + ".patches"))
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
            resized = p.resize(pixels, size=p.size, resample=p.resample, factor=p.patch_size * p.merge_size)
            resized.permute(1, 2, 0).contiguous().numpy().tofile(os.path.join(root, name + ".resized"))
            out.append({
                "processor": d,
                "file": item["file"],
                "grid": made["image_grid_thw"][0].tolist(),
                "shape": list(made["pixel_values"].shape),
                "resized": [resized.shape[2], resized.shape[1]],
            })
    return out


def sizes(job):
    out = []
    for h, w, factor, low, high in job["sizes"]:
        try:
            out.append(list(smart_resize(h, w, factor, low, high)))
        except ValueError:
            out.append(None)
    return out


def main():
    root = sys.argv[1]
    with open(os.path.join(root, "job.json"), encoding="utf-8") as f:
        job = json.load(f)
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(root, "tiny"))
    processors = {d: AutoProcessor.from_pretrained(os.path.join(root, d)) for d in job["directories"]}
    prompts = []
    for p in job["prompts"]:
        processor = processors[p["dir"]]
        picture = [read_image(root, i) for i in p["images"]]
        content = [{"type": "image"} for _ in picture] + [{"type": "text", "text": p["question"]}]
        messages = [{"role": "user", "content": content}]
        if p["system"]:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": p["system"]}]})
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        ids = processor(text=[text + p["answer"]], images=picture or None)["input_ids"][0]
        prompts.append({"text": text, "ids": [int(i) for i in ids]})
    out = {
        "images": images(root, job),
        "sizes": sizes(job),
        "texts": [tokenizer(t)["input_ids"] for t in job["texts"]],
        "decoded": [tokenizer.decode(ids, skip_special_tokens=True) for ids in job["ids"]],
        "prompts": prompts,
        "elsewhere": [len(processors["elsewhere"].tokenizer),
                      processors["elsewhere"].tokenizer.convert_tokens_to_ids("<|quad_start|>")],
        "vocab_size": len(tokenizer),
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
        "image_token_id": processors["tiny"].image_token_id,
        "video_token_id": processors["tiny"].video_token_id,
        "classes": {d: type(p).__name__ for d, p in processors.items()},
    }
    with open(os.path.join(root, "out.json"), "w", encoding="utf-8") as f:
        json.dump(out, f)


main()
