"""Localization, vision relevance and format in the style of TRL reward functions: numpy and scipy, one function per component that gets
the completions and, per completion, the columns of its record, and returns a list of numbers. `reward_peer.py DIR values` prints all
scores; `reward_peer.py DIR flat SECONDS` prints responses per second; `grouped` instead of `flat` passes one group per call and shares
work between its completions, which TRL's functions cannot.
"""

import json
import os
import re
import sys
import time

for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[threads] = "1"

import numpy as np  # noqa: E402
from scipy.optimize import linear_sum_assignment  # noqa: E402

BOX = re.compile(r"\[([^\[\]]*)\]")
FORM = re.compile(r"\s*(?:\[[^\[\]]*\][\s,]*)+[^\[\]]*\S[^\[\]]*")


def read_boxes(text):
    """Returns all brackets with four numbers."""
    boxes = []
    for inner in BOX.findall(text):
        try:
            numbers = [float(v) for v in inner.split(",")]
        except ValueError:
            continue
        if len(numbers) == 4:
            boxes.append(numbers)
    return np.array(boxes, dtype=np.float64).reshape(-1, 4)


def valid(boxes, image):
    """Returns whether a box is finite, not inverted, has area and is inside the image (with one pixel of slack)."""
    ok = np.isfinite(boxes).all(1) & (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    return ok & (boxes[:, :2] >= -1).all(1) & (boxes[:, 2] <= image[0] + 1) & (boxes[:, 3] <= image[1] + 1)


def iou(a, b):
    """Returns the matrix of IoUs."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(2)
    area_a, area_b = (a[:, 2:] - a[:, :2]).prod(1), (b[:, 2:] - b[:, :2]).prod(1)
    return inside / (area_a[:, None] + area_b[None, :] - inside)


def localization_reward(completions, boxes, image):
    """Computes the soft F1 score."""
    scores = []
    for text, truth in zip(completions, boxes):
        said = read_boxes(text)
        good = said[valid(said, image)]
        matched = 0.0
        if len(good) and len(truth):
            table = iou(good, truth)
            rows, columns = linear_sum_assignment(table, maximize=True)
            matched = table[rows, columns].sum()
        scores.append(2 * matched / (len(said) + len(truth)) if len(said) and len(truth) else 0.0)
    return scores


def coverage(truth, grid, image):
    """Returns the fraction of each cell covered by the union of the boxes; exact, by cutting the image at every edge."""
    xs = np.unique(np.concatenate([np.linspace(0, image[0], grid[1] + 1), truth[:, 0], truth[:, 2]]).clip(0, image[0]))
    ys = np.unique(np.concatenate([np.linspace(0, image[1], grid[0] + 1), truth[:, 1], truth[:, 3]]).clip(0, image[1]))
    mx, my = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    covered = np.zeros((len(my), len(mx)), dtype=bool)
    for x1, y1, x2, y2 in truth:
        covered |= ((my > y1) & (my < y2))[:, None] & ((mx > x1) & (mx < x2))[None, :]
    area = covered * np.diff(ys)[:, None] * np.diff(xs)[None, :]
    rows = (my / image[1] * grid[0]).astype(int)
    columns = (mx / image[0] * grid[1]).astype(int)
    out = np.zeros(grid)
    np.add.at(out, (rows[:, None], columns[None, :]), area)
    return (out / (image[0] / grid[1] * image[1] / grid[0])).ravel()


def vision_reward(completions, spans, tokens, rows, category, boxes, grid, image, shared=None):
    """Computes the chance-corrected attention of the class tokens to the boxes; `shared` is their coverage if equal for all completions."""
    scores = []
    for text, span, token, row, name, truth in zip(completions, spans, tokens, rows, category, boxes):
        m = coverage(truth, grid, image) if shared is None else shared
        a = m.mean()
        at = text.lower().find(name.lower())
        if at < 0:
            scores.append(0.0)
            continue
        end = at + len(name)
        named = [token.index(i) for i, (b, e) in enumerate(span) if b < end and e > at and b < e]
        p = np.frombuffer(row, dtype=np.float32).reshape(len(token), -1)[named].astype(np.float64)
        if not (np.isfinite(p).all() and (p >= 0).all() and (abs(p.sum(1) - 1) <= 0.05).all()):
            scores.append(None)
            continue
        s = ((p * m).sum(1) / p.sum(1)).mean()
        scores.append(float(np.clip((s - a) / (1 - a), 0, 1)))
    return scores


def format_reward(completions):
    """Scores the form of the answer."""
    return [1.0 if FORM.fullmatch(t) and len(read_boxes(t)) == t.count("[") else 0.0 for t in completions]


def score(batch, grid, image, grouped):
    """Returns all components of a batch, and the total."""
    texts, boxes = batch["texts"], batch["boxes"]
    shared = coverage(boxes[0], grid, image) if grouped else None
    place = localization_reward(texts, boxes, image)
    look = vision_reward(texts, batch["spans"], batch["tokens"], batch["rows"], batch["category"], boxes, grid, image, shared)
    form = format_reward(texts)
    return [[p, v, f, p + 0.5 * v + 0.1 * f] for p, v, f in zip(place, look, form)]


def load(folder):
    """Returns groups as passed by a trainer."""
    data = json.load(open(f"{folder}/groups.json"))
    raw = open(f"{folder}/rows.bin", "rb").read()
    grid, image = tuple(data["grid"]), tuple(data["image"])
    size = 2 * grid[0] * grid[1] * 4
    at, groups = 0, []
    for g in data["groups"]:
        rows = []
        for _ in g["responses"]:
            rows.append(raw[at:at + size])
            at += size
        groups.append({"texts": [r["text"] for r in g["responses"]], "spans": [r["spans"] for r in g["responses"]],
                       "tokens": [r["tokens"] for r in g["responses"]], "rows": rows, "category": [g["category"]] * len(rows),
                       "boxes": [np.array(g["boxes"], dtype=np.float64).reshape(-1, 4)] * len(rows)})
    return groups, grid, image


def main():
    """Runs the mode given on the command line."""
    groups, grid, image = load(sys.argv[1])
    if sys.argv[2] == "values":
        print(json.dumps([r for g in groups for r in score(g, grid, image, False)]))
        return
    grouped = sys.argv[2] == "grouped"
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < float(sys.argv[3]):
        for g in groups[:32]:
            done += len(score(g, grid, image, grouped))
    print(json.dumps({"rate": done / (time.perf_counter() - start)}))


if __name__ == "__main__":
    main()
