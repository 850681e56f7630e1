"""What transformers' logits warpers leave of random logits: DIR/in.st to probabilities in DIR/out.st."""

import pathlib
import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

root = pathlib.Path(sys.argv[1])
given = load_file(root / "in.st")
rows = []
for logits, (temperature, top_k, top_p, min_p) in zip(given["logits"], given["settings"].tolist()):
    scores = TemperatureLogitsWarper(temperature)(None, logits[None].double())
    if top_k:
        scores = TopKLogitsWarper(int(top_k))(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = MinPLogitsWarper(min_p)(None, scores)
    rows.append(scores.softmax(-1)[0])
save_file({"probabilities": torch.stack(rows)}, root / "out.st")
