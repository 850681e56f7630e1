"""Independent references for the scorers: torchvision, scipy, rouge-score, sacrebleu, difflib, TRL, and SQuAD's normalisation.

Reads one JSON object on stdin and writes one on stdout; each function documents its input and output.
"""

import collections
import difflib
import json
import re
import string
import sys


def boxes(request):
    """cases: [{"predicted", "true"}], matrices: [[[w]]] -> iou, giou, ciou per case, soft_f1 per overlap, optimum per matrix."""
    import torch
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import box_iou, complete_box_iou, generalized_box_iou
    maps = {"iou": (box_iou, lambda x: x), "giou": (generalized_box_iou, lambda x: (1 + x) / 2),
            "ciou": (complete_box_iou, lambda x: (1.5 + x) / 2.5)}
    out = {"iou": [], "giou": [], "ciou": [], "soft_f1": [], "optimum": []}
    for case in request["cases"]:
        predicted = torch.tensor(case["predicted"], dtype=torch.float64).reshape(-1, 4)
        true = torch.tensor(case["true"], dtype=torch.float64).reshape(-1, 4)
        scores = []
        for name, (overlap, mapped) in maps.items():
            raw = overlap(predicted, true).numpy()
            out[name].append(raw.tolist())
            value = mapped(raw)
            rows, columns = linear_sum_assignment(value, maximize=True)
            scores.append(2.0 * value[rows, columns].sum() / (len(predicted) + len(true)))
        out["soft_f1"].append(scores)
    for matrix in request["matrices"]:
        matrix = torch.tensor(matrix, dtype=torch.float64).numpy()
        rows, columns = linear_sum_assignment(matrix, maximize=True)
        out["optimum"].append(matrix[rows, columns].sum())
    return out


def labels(request):
    """cases: [{"predicted", "true", "said", "labels", "category"}] -> soft_f1 per overlap: pairs whose labels differ are masked before
    the assignment. A box of the answer without a label has every label that the answer names, if all of these are present; a true box
    without a label has the category."""
    import numpy as np
    import torch
    from scipy.optimize import linear_sum_assignment
    from torchvision.ops import box_iou, complete_box_iou, generalized_box_iou
    maps = [(box_iou, lambda x: x), (generalized_box_iou, lambda x: (1 + x) / 2), (complete_box_iou, lambda x: (1.5 + x) / 2.5)]
    out = []
    for case in request["cases"]:
        predicted = torch.tensor(case["predicted"], dtype=torch.float64).reshape(-1, 4)
        true = torch.tensor(case["true"], dtype=torch.float64).reshape(-1, 4)
        named = {label.lower() for label in case["said"] if label}
        truth = [label.lower() for label in case["labels"]] or [case["category"]] * len(true)
        named = named if len(named) == 1 or named <= set(truth) else set()
        mask = np.array([[t in ({p.lower()} if p else named) for t in truth] for p in case["said"]])
        scores = []
        for overlap, mapped in maps:
            value = np.where(mask, mapped(overlap(predicted, true).numpy()), 0.0)
            rows, columns = linear_sum_assignment(value, maximize=True)
            scores.append(2.0 * value[rows, columns].sum() / (len(predicted) + len(true)))
        out.append(scores)
    return {"soft_f1": out}


def squad_words(text):
    """Normalises a text as SQuAD's evaluation script does."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def texts(request):
    """pairs: [[answer, reference]] -> exact, f1, rouge, bleu, ratio (of reference and answer) per pair."""
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer
    rouge = RougeScorer(["rougeL"], use_stemmer=False)
    out = {"exact": [], "f1": [], "rouge": [], "bleu": [], "ratio": []}
    for answer, reference in request["pairs"]:
        a, r = squad_words(answer), squad_words(reference)
        same = sum((collections.Counter(a) & collections.Counter(r)).values())
        f1 = 2 * (same / len(a)) * (same / len(r)) / (same / len(a) + same / len(r)) if same else float(not a and not r)
        out["exact"].append(float(a == r))
        out["f1"].append(f1)
        out["rouge"].append(rouge.score(reference, answer)["rougeL"].fmeasure)
        out["bleu"].append(sacrebleu.sentence_bleu(answer, [reference]).score / 100)
        out["ratio"].append(difflib.SequenceMatcher(None, reference, answer).ratio())
    return out


def embedding(request):
    """dir, texts -> a random BERT is written to dir; vectors: mean of its last hidden states per text, by transformers."""
    import torch
    from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizerFast
    torch.manual_seed(request["seed"])
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase, *("##" + c for c in string.ascii_lowercase),
             *string.digits, ".", ",", "lung", "nodule", "left", "right", "no", "finding", "the", "##ule", "##s"]
    vocabulary = f"{request['dir']}/vocab.txt"
    with open(vocabulary, "w") as f:
        f.write("\n".join(words))
    config = BertConfig(vocab_size=len(words), hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96,
                        max_position_embeddings=64, initializer_range=0.2)
    model = BertModel(config).eval()
    with torch.no_grad():  # biases and norms are constant after initialisation
        for name, p in model.named_parameters():
            if "bias" in name or "LayerNorm" in name:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(request["dir"])
    BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}, vocab_file=vocabulary).save_pretrained(request["dir"])
    tokenizer, model = AutoTokenizer.from_pretrained(request["dir"]), AutoModel.from_pretrained(request["dir"]).eval()
    vectors = []
    with torch.no_grad():
        for text in request["texts"]:
            inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=64)
            state = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None]
            vectors.append(((state * mask).sum(1) / mask.sum(1))[0].tolist())
    return {"vectors": vectors}


def overlong(request):
    """cases: [[tokens, max_tokens, interval]] -> TRL's soft overlong punishment of a response of that length."""
    from trl.rewards import get_soft_overlong_punishment
    return {"values": [get_soft_overlong_punishment(most, interval)([[1] * n])[0] for n, most, interval in request["cases"]]}


request = json.load(sys.stdin)
json.dump({"boxes": boxes, "labels": labels, "texts": texts, "embedding": embedding, "overlong": overlong}[request["what"]](request), sys.stdout)
