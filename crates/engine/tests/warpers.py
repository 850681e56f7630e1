"""Applies transformers' logits warpers to the logits and settings in DIR/in.st, and writes the probabilities to DIR/out.st."""

import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

root = pathlib.Path(sys.argv[1])
inputs = load_file(root / "in.st")
rows = []
for logits, (temperature, top_k, top_p, min_p) in zip(inputs["logits"], inputs["settings"].tolist()):
    scores = TemperatureLogitsWarper(temperature)(None, logits[None].double())
    if top_k:
        scores = TopKLogitsWarper(int(top_k))(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    rows.append(scores.softmax(-1)[0])
save_file({"probabilities": torch.stack(rows)}, root / "out.st")
