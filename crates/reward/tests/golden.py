"""Reference for localization: IoU from torchvision, assignment from scipy, soft F1 from its definition.

Reads {"cases": [{"predicted": [[x1,y1,x2,y2]], "true": [[..]]}], "matrices": [[[w]]]} on stdin; writes
{"iou": [matrix], "soft_f1": [float], "optimum": [float]} on stdout.
"""

import json
import sys

import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

request = json.load(sys.stdin)
out = {"iou": [], "soft_f1": [], "optimum": []}
for case in request["cases"]:
    predicted = torch.tensor(case["predicted"], dtype=torch.float64).reshape(-1, 4)
    true = torch.tensor(case["true"], dtype=torch.float64).reshape(-1, 4)
    iou = box_iou(predicted, true).numpy()
    rows, columns = linear_sum_assignment(iou, maximize=True)
    count = len(predicted) + len(true)
    out["iou"].append(iou.tolist())
    out["soft_f1"].append(2.0 * iou[rows, columns].sum() / count)
for matrix in request["matrices"]:
    matrix = torch.tensor(matrix, dtype=torch.float64).numpy()
    rows, columns = linear_sum_assignment(matrix, maximize=True)
    out["optimum"].append(matrix[rows, columns].sum())
json.dump(out, sys.stdout)
