"""transformers' side of tests/benchmarks/bench_gemma.py: loads once, then times on request.

    python tests/reference/bench_transformers.py GGUF_FILE THREADS

Reads JSON lines {"prompts": [[ids], ...], "new_tokens": N}, all prompts of one length: a static
batch without padding. Answers {"seconds": ..., "token_ids": [...]}. Float32, greedy.
"""

from __future__ import annotations

import json
import sys
import time

import torch
from transformers_gemma import load


@torch.inference_mode()
def main(gguf_file: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    model, _ = load(gguf_file)
    model.generation_config.eos_token_id = None  # run to the length asked for
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        prompts = torch.tensor(task["prompts"])
        began = time.perf_counter()
        result = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            max_new_tokens=task["new_tokens"],
        )
        seconds = time.perf_counter() - began
        token_ids = result[:, prompts.shape[1] :].tolist()
        print(json.dumps({"seconds": seconds, "token_ids": token_ids}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
