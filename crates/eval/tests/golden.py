"""Computes the suites over a response file independently: torchvision's IoU, scipy's assignment and bootstrap, numpy.

argv: JSON file with "draws" {stream: {n: [[index]]}} and "names" {category: [names]}, then a box form and a response file per comparison.
Prints one line of JSON per comparison.
"""
import gc
import json
import os
import re
import sys

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import bootstrap
from torchvision.ops import box_iou


def forked():
    """Returns a box form and a response file in a new process each; ends the program after all of them."""
    gc.freeze()  # else each process collects what was imported
    for form, path in zip(sys.argv[2::2], sys.argv[3::2]):
        child = os.fork()
        if child == 0:
            return form, path
        if os.waitpid(child, 0)[1] != 0:
            sys.exit(f"{form} failed")
    sys.exit()


given = json.load(open(sys.argv[1]))
form, path = forked()


def read(text):
    """Returns (boxes as written, category, says none, fault)."""
    boxes, fault, last = [], None, 0
    for m in re.finditer(r"\[([^\[\]]*)(\]?)", text):
        parts = m[1].split(",")
        try:
            numbers = [float(p) for p in parts] if len(parts) == 4 and m[2] else None
        except ValueError:
            numbers = None
        if numbers is None:
            fault = fault or "bracket"
        else:
            boxes.append(numbers)
        last = m.end()
    outside = re.sub(r"\[[^\[\]]*\]?", "", text)
    before = text[: max((m.start() for m in re.finditer(r"\[", text)), default=0)]
    before = re.sub(r"\[[^\[\]]*\]?", "", before)
    category = text[last:].strip()
    if not boxes and fault is None and outside.strip().lower() == "no finding":
        return [], "", True, None
    if fault is None:
        if not boxes:
            fault = "no_box" if category else "empty"
        elif not category:
            fault = "no_category"
        elif re.sub(r"[\s,]", "", before):
            fault = "order"
    return boxes, category, False, fault


def pixels(box, size, resized):
    extent = {"absolute": resized, "per_mille": (1000, 1000), "llava": (1, 1)}[form]
    scale = [size[0] / extent[0], size[1] / extent[1]] * 2
    return [float(np.float32(v * s)) for v, s in zip(box, scale)]


def valid(b, size):
    return bool(np.isfinite(b).all()) and b[0] < b[2] and b[1] < b[3] and b[0] >= -1 and b[1] >= -1 \
        and b[2] <= size[0] + 1 and b[3] <= size[1] + 1


def coverage(boxes, size, grid):
    """Returns the share of each cell covered by the union: on the lattice of all edges, each tile is inside a box or not."""
    rows, cols = grid
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    xs = np.unique(np.concatenate([np.arange(cols + 1) * size[0] / cols, boxes[:, 0], boxes[:, 2]]).clip(0, size[0]))
    ys = np.unique(np.concatenate([np.arange(rows + 1) * size[1] / rows, boxes[:, 1], boxes[:, 3]]).clip(0, size[1]))
    cx, cy = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    inside = np.zeros((len(cy), len(cx)), dtype=bool)
    for x1, y1, x2, y2 in boxes:
        inside |= ((cy > y1) & (cy < y2))[:, None] & ((cx > x1) & (cx < x2))[None, :]
    area = inside * np.diff(ys)[:, None] * np.diff(xs)[None, :]
    out = np.zeros((rows, cols))
    at_y = np.minimum((cy * rows / size[1]).astype(int), rows - 1)
    at_x = np.minimum((cx * cols / size[0]).astype(int), cols - 1)
    np.add.at(out, (at_y[:, None], at_x[None, :]), area)
    return (out / (size[0] / cols * size[1] / rows)).astype(np.float32).astype(np.float64).reshape(-1)


def mention(text, names):
    found = [(text.lower().find(n.lower()), -len(n), n) for n in names if n.lower() in text.lower()]
    if not found:
        return None
    at, _, name = min(found)
    return len(text[:at].encode()), len(text[: at + len(name)].encode())


def judge(line):
    size, truth = line["image_size"], line["boxes"]
    truth = [[float(np.float32(v)) for v in b] for b in truth]
    written, category, none, fault = read(line["response"])
    boxes = [pixels(b, size, line["resized_size"]) for b in written]
    good = [valid(b, size) for b in boxes]
    names = given["names"].get(line["category"], [line["category"]])
    iou = lambda a, b: box_iou(torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)).numpy()
    out = {"fault": fault, "boxes": len(boxes), "invalid": good.count(False), "source": line["source"], "id": line["id"]}
    out["iou"] = None
    if len(truth) == 1:
        out["iou"] = float(iou(truth, boxes[:1])[0, 0]) if boxes and good[0] else 0.0
    usable = [b for b, g in zip(boxes, good) if g]
    if not truth:
        out["soft_f1"] = float(none and not boxes)
    elif not usable:
        out["soft_f1"] = 0.0
    else:
        table = iou(truth, usable)
        r, c = linear_sum_assignment(table, maximize=True)
        out["soft_f1"] = 2 * table[r, c].sum() / (len(boxes) + len(truth))
    out["correct"] = none if not truth else category.lower() in [n.lower() for n in names]
    share = coverage(truth, size, (1, 1))[0] if truth else 0.0
    out["look"] = None
    if 0 < share < 1 - 1e-6:
        span = mention(line["response"], names)
        if span is None:
            out["look"] = "unnamed"
        else:
            tokens = [i for i, (b, e) in enumerate(line.get("spans", [])) if b < e and b < span[1] and e > span[0]]
            attention = line.get("attention")
            if not tokens or attention is None or any(t not in attention["tokens"] for t in tokens):
                out["look"] = "no_rows"
            else:
                rows = np.array([attention["rows"][attention["tokens"].index(t)] for t in tokens], dtype=np.float32).astype(np.float64)
                row = (rows / rows.sum(1, keepdims=True)).mean(0)
                m = coverage(truth, size, attention["grid"])
                out["look"] = {"hit": m[row.argmax()] > 0, "energy": (row * m).sum(), "hit_chance": (m > 0).mean(),
                               "energy_chance": m.mean(), "lift": (row * m).sum() / m.mean()}
    return out


judged = [judge(json.loads(line)) for line in open(path)]
rows = lambda key: lambda j: (j["look"][key], 1) if isinstance(j["look"], dict) else None
looks = lambda key: lambda j: (0.0, 1) if j["look"] == "unnamed" else rows(key)(j)
METRICS = {
    "mean_iou": lambda j: None if j["iou"] is None else (j["iou"], 1),
    "acc50": lambda j: None if j["iou"] is None else (j["iou"] >= 0.5, 1),
    "acc75": lambda j: None if j["iou"] is None else (j["iou"] >= 0.75, 1),
    "soft_f1": lambda j: (j["soft_f1"], 1),
    "pointing_game": looks("hit"),
    "in_box_energy": looks("energy"),
    "pointing_chance": rows("hit_chance"),
    "energy_chance": rows("energy_chance"),
    "mentioned": lambda j: None if j["look"] is None else (j["look"] != "unnamed", 1),
    "parse_failures": lambda j: (j["fault"] is not None, 1),
    "invalid_boxes": lambda j: (j["invalid"], j["boxes"]) if j["boxes"] else None,
    "boxes_per_answer": lambda j: (j["boxes"], 1),
}


def sums(of, among):
    by = {}
    for j in among:
        pair = of(j)
        if pair is not None:
            by.setdefault(j["id"], np.zeros(2))
            by[j["id"]] += pair
    return np.array(list(by.values()), dtype=np.float64).reshape(-1, 2)


def resampled(table, stream):
    drawn = table[np.array(given["draws"][str(stream)][str(len(table))])]
    return drawn[:, :, 0].sum(1) / drawn[:, :, 1].sum(1)


def estimate(table, means=None):
    if not len(table):
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = np.quantile(resampled(table, 0), [0.025, 0.975])
    return {"value": table[:, 0].sum() / table[:, 1].sum(), "low": low, "high": high, "n": int(table[:, 1].sum())}


def own_bootstrap(table):
    ratio = lambda s, c, axis: s.sum(axis) / c.sum(axis)
    found = bootstrap((table[:, 0], table[:, 1]), ratio, paired=True, vectorized=True, method="percentile",
                      n_resamples=4000, confidence_level=0.95, rng=np.random.default_rng(5))
    interval = found.confidence_interval
    return {"low": interval.low, "high": interval.high, "se": found.standard_error}


right = lambda j: (j["correct"], 1)
names = sorted({j["source"] for j in judged})
strata = [sums(right, [j for j in judged if j["source"] == s]) for s in names]
means = np.mean([resampled(t, i) for i, t in enumerate(strata)], axis=0)
low, high = np.quantile(means, [0.025, 0.975])
faults = [j["fault"] for j in judged if j["fault"]]
mean = lambda values: float(np.mean(values)) if values else 0.0
lift = [0.0 if j["look"] == "unnamed" else j["look"]["lift"] for j in judged if j["look"] not in (None, "no_rows")]
iou = [j["iou"] for j in judged if j["iou"] is not None]
print(json.dumps({
    "metrics": {name: estimate(sums(of, judged)) for name, of in METRICS.items()},
    "scipy": {name: own_bootstrap(sums(METRICS[name], judged)) for name in ["mean_iou", "soft_f1", "in_box_energy"]},
    "faults": {f: faults.count(f) for f in set(faults)},
    "without_rows": sum(j["look"] == "no_rows" for j in judged),
    "accuracy": {"value": np.mean([t[:, 0].sum() / t[:, 1].sum() for t in strata]), "low": low, "high": high, "n": len(names)},
    "sources": {s: estimate(t) for s, t in zip(names, strata)},
    "summary": {"accuracy": mean([j["correct"] for j in judged]), "mean_iou": mean(iou), "acc50": mean([v >= 0.5 for v in iou]),
                "soft_f1": mean([j["soft_f1"] for j in judged]), "vision_lift": mean(lift), "n": len(judged)},
}, default=lambda v: v.item()))
sys.stdout.flush()
os._exit(0)  # without the destruction of all modules
