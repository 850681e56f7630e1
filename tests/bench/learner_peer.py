"""Peer of learner.py: TRL's GRPO update step, controlled line by line (see process.py).

learner_peer.py MODEL_DIR PROMPTS N NEW BATCH THREADS

Writes BATCH before it reports readiness: random responses `tokens [G, n, new]`, their log-probabilities under the weights
(`logprobs`, with noise so that ratios are not 1), `rewards [G, n]`. Command: `update {calls}` returns the seconds of each update,
and the loss and gradient norm of the first.
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

logging.set_verbosity_error()


class Peer:
    def __init__(self, model, prompts, n, new, batch, threads):
        torch.set_num_threads(int(threads))
        n, new = int(n), int(new)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa")
        c, text = self.model.config, self.model.config.text_config
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"<p>": 0}, unk_token="<p>")),
                                            pad_token="<p>", eos_token="<p>", unk_token="<p>")
        args = GRPOConfig(
            output_dir=tempfile.mkdtemp(), loss_type="bnpo", epsilon=0.2, epsilon_high=0.28, beta=0.0, num_generations=n,
            per_device_train_batch_size=n, gradient_accumulation_steps=1, max_completion_length=new, use_cpu=True,
            report_to=[], gradient_checkpointing=False, bf16=False, logging_steps=10**9)
        self.trainer = GRPOTrainer(
            model=self.model, reward_funcs=lambda **k: [0.0] * n, args=args, processing_class=tokenizer,
            train_dataset=Dataset.from_dict({"prompt": ["x"] * n}))
        self.trainer.current_gradient_accumulation_steps = 1
        self.model.train()
        data = load_file(prompts)
        groups = sum(k.endswith(".tokens") for k in data)
        generator = torch.Generator().manual_seed(5)
        # Without special tokens, the last of the vocabulary, which neither side samples.
        tokens = torch.randint(0, text.vocab_size - 8, (groups, n, new), generator=generator)
        rewards = torch.rand(groups, n, generator=generator)
        own = [data[f"{g:03}.tokens"] for g in range(groups)]
        longest = max(map(len, own))
        left = [torch.cat([torch.full((longest - len(o),), text.pad_token_id), o]) for o in own]
        prompt_ids = torch.stack(left).repeat_interleave(n, 0)
        mask = torch.stack([(torch.arange(longest) >= longest - len(o)).long() for o in own]).repeat_interleave(n, 0)
        completion = tokens.flatten(0, 1)
        ids = torch.cat([prompt_ids, completion], 1)
        self.inputs = dict(
            prompt_ids=prompt_ids, prompt_mask=mask, completion_ids=completion, completion_mask=torch.ones_like(completion),
            pixel_values=torch.cat([data[f"{g:03}.pixels"].repeat(n, 1) for g in range(groups)]),
            image_grid_thw=data["grid"].repeat(groups * n, 1), num_images=[1] * (groups * n),
            mm_token_type_ids=(ids == c.image_token_id).int(),
            advantages=((rewards - rewards.mean(1, True)) / (rewards.std(1, keepdim=True) + 1e-6)).flatten())
        with torch.no_grad():
            logps, _, _ = self.trainer._get_per_token_logps_and_entropies(
                self.model, ids, torch.cat([mask, torch.ones_like(completion)], 1), new,
                **{k: self.inputs[k] for k in ("pixel_values", "image_grid_thw", "num_images", "mm_token_type_ids")})
        self.inputs["old_per_token_logps"] = logps + 0.2 * torch.randn(logps.shape, generator=generator)
        save_file(dict(tokens=tokens, rewards=rewards, logprobs=self.inputs["old_per_token_logps"].view(groups, n, new)), batch)
        decay = [p for p in self.model.parameters() if p.dim() >= 2], [p for p in self.model.parameters() if p.dim() < 2]
        self.optimizer = torch.optim.AdamW([dict(params=p, weight_decay=0.0) for p in decay], lr=1e-5, fused=True)

    def update(self, calls):
        seconds, first = [], None
        for _ in range(calls):
            start = time.perf_counter()
            loss = self.trainer.compute_loss(self.model, self.inputs)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
            first = first or dict(loss=loss.item(), grad_norm=norm.item())
        return dict(seconds=seconds, **first)


def main():
    out = sys.stdout
    sys.stdout = sys.stderr  # keep the trainer's output out of the replies on stdout
    peer = Peer(*sys.argv[1:7])
    print(json.dumps({"ready": True}), file=out, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        print(json.dumps(peer.update(command["calls"])), file=out, flush=True)


if __name__ == "__main__":
    main()
