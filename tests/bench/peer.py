"""Peer: `generate` of transformers, controlled line by line (see process.py).

peer.py MODEL_DIR PROMPTS DEVICE DTYPE THREADS

Commands
    greedy     {groups, new}                       tokens of the most probable continuation of each prompt
    generate   {groups, n, new, cache, calls}      seconds of each call
    gaps       {responses}                         gap of each token's logit to the highest, in standard deviations
    bandwidth  {}                                  bytes per second read and written by a large copy on the device

For a fair comparison, the image is encoded once per prompt and its features are repeated (as `generate` does), attention is
`sdpa`, sampling filters are off, and the same list of special tokens is suppressed, including the end token, so that no minimum
length is needed.
"""

import json
import os
import sys
import time

import torch
from safetensors.torch import load_file
from transformers import CompileConfig, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging

logging.set_verbosity_error()
CACHES = ("dynamic", "static", "static-compiled")


class Peer:
    def __init__(self, model, prompts, device, dtype, threads):
        torch.set_num_threads(int(threads))
        self.device = torch.device(device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no GPU is usable here (torch.cuda.is_available() is false); use --device cpu")
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model, dtype=getattr(torch, dtype), attn_implementation="sdpa").to(self.device).eval()
        self.prompts = load_file(prompts)
        self.images = 0
        self.model.model.visual.register_forward_hook(self.count, with_kwargs=True)

    def count(self, _module, args, kwargs, _out):
        self.images += len(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])

    def inputs(self, groups, responses=None):
        """Returns left-padded inputs of the first prompts, followed by responses if given."""
        config, rows = self.model.config, []
        for g in range(groups):
            rows.append(self.prompts[f"{g:03}.tokens"].tolist() + (responses[g] if responses else []))
        longest = max(map(len, rows))
        pad = config.text_config.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (longest - len(r)) + [1] * len(r) for r in rows])
        pixels = torch.cat([self.prompts[f"{g:03}.pixels"] for g in range(groups)])
        out = dict(input_ids=ids, attention_mask=mask, mm_token_type_ids=(ids == config.image_token_id).int(),
                   pixel_values=pixels, image_grid_thw=self.prompts["grid"].repeat(groups, 1))
        return {k: v.to(self.device) for k, v in out.items()}

    def suppressed(self):
        c = self.model.config
        return [c.image_token_id, c.video_token_id, c.vision_start_token_id, c.vision_end_token_id,
                c.text_config.eos_token_id]

    def run(self, inputs, new, cache, **how):
        """Runs one call of generate, from inputs on the device to new tokens on the host."""
        self.model.model.rope_deltas = None
        options = {"cache_implementation": "static"} if cache != "dynamic" else {}
        if cache == "static-compiled":
            compile = CompileConfig()
            compile._compile_all_devices = True
            options["compile_config"] = compile
        elif cache == "static":
            options["disable_compile"] = True
        out = self.model.generate(**inputs, max_new_tokens=new, suppress_tokens=self.suppressed(), **options, **how)
        return out[:, inputs["input_ids"].shape[1]:].tolist()

    def greedy(self, groups, new):
        return {"tokens": self.run(self.inputs(groups), new, "dynamic", do_sample=False)}

    def generate(self, groups, n, new, cache, calls, seed=0):
        inputs, seconds, images, lengths = self.inputs(groups), [], self.images, set()
        torch.manual_seed(seed)
        for _ in range(calls):
            self.synchronize()
            start = time.perf_counter()
            tokens = self.run(inputs, new, cache, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                              num_return_sequences=n)
            self.synchronize()
            seconds.append(time.perf_counter() - start)
            lengths |= {len(t) for t in tokens} | {-len(tokens)}
        if lengths != {new, -groups * n}:
            raise RuntimeError(f"expected {groups * n} responses of {new} tokens, got {lengths}")
        return {"seconds": seconds, "images": (self.images - images) / calls}

    def gaps(self, responses):
        inputs = self.inputs(len(responses), responses)
        self.model.model.rope_deltas = None
        worst = []
        logits = self.model(**inputs).logits.float()
        for g, response in enumerate(responses):
            own = logits[g, -len(response) - 1:-1]
            own[:, self.suppressed()] = -torch.inf
            chosen = own.gather(1, torch.tensor(response, device=own.device)[:, None])[:, 0]
            deviation = torch.where(own.isfinite(), own, own.new_tensor(torch.nan)).nanmean(1, keepdim=True)
            deviation = torch.where(own.isfinite(), (own - deviation) ** 2, 0).mean(1).sqrt()
            worst.append(((own.max(1).values - chosen) / deviation).tolist())
        return {"gaps": worst}

    def bandwidth(self):
        size = 1 << (30 if self.device.type == "cuda" else 28)
        source, target = (torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(2))
        rates = []
        for _ in range(12):
            self.synchronize()
            start = time.perf_counter()
            target.copy_(source)
            self.synchronize()
            rates.append(2 * size / (time.perf_counter() - start))
        return {"bytes_per_second": sorted(rates)[len(rates) // 2]}

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main():
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep library output out of the replies on stdout

    def say(reply):
        out.write(json.dumps(reply) + "\n")
        out.flush()
    try:
        with torch.inference_mode():
            peer = Peer(*sys.argv[1:])
            gpu = torch.cuda.get_device_name(peer.device) if peer.device.type == "cuda" else None
            say({"ready": True, "gpu": gpu})
            for line in sys.stdin:
                command = json.loads(line)
                say(getattr(peer, command.pop("op"))(**command))
    except Exception as error:
        import traceback
        traceback.print_exc()
        say({"error": f"{type(error).__name__}: {error}"})
        sys.exit(1)


main()
