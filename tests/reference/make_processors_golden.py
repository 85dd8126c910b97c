"""Make tests/fixtures/logits_processors.json: what transformers' processors ban, and what models
write under them. Needs torch and transformers, which the project itself does not:

    python tests/reference/make_processors_golden.py
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
)

FIXTURES = Path(__file__).parents[1] / "fixtures"
VOCAB = 12
MODELS = {"qwen3": 3, "gemma3": 2, "gpt2": 1}  # and the n-grams that must not repeat


def banned(processor: Any, tokens: list[int]) -> list[int]:
    scores = processor(torch.tensor([tokens]), torch.zeros(1, VOCAB))
    return torch.isinf(scores[0]).nonzero().flatten().tolist()


def cases() -> list[dict[str, Any]]:
    draw = random.Random(0)
    found = []
    for _ in range(60):
        tokens = [draw.randrange(6) for _ in range(draw.randint(1, 14))]
        words = [
            [draw.randrange(6) for _ in range(draw.randint(1, 4))]
            for _ in range(draw.randint(1, 5))
        ]
        size = draw.randint(1, 4)
        found.append(
            {
                "tokens": tokens,
                "bad_words": words,
                "banned_by_words": banned(NoBadWordsLogitsProcessor(words), tokens),
                "ngram": size,
                "banned_by_ngram": banned(NoRepeatNGramLogitsProcessor(size), tokens),
            }
        )
    return found


def write(model: Any, prompt: list[int], **options: Any) -> tuple[list[int], list[float]]:
    """Tokens, and how far the best was ahead at each."""
    answer = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    best = [torch.topk(score[0], 2).values for score in answer.scores]
    margins = [min(float(top[0] - top[1]), 1e9) for top in best]
    return answer.sequences[0, len(prompt) :].tolist(), margins


def written() -> list[dict[str, Any]]:
    found = []
    for name, ngram in MODELS.items():
        model = AutoModelForCausalLM.from_pretrained(FIXTURES / "models" / name)
        model.eval()
        prompt = [3, 40, 41, 3, 40, 9]

        free, _ = write(model, prompt)
        words = [free[:2], free[4:7], [free[9]]]
        for options in (
            {"bad_words_ids": words},
            {"no_repeat_ngram_size": ngram},
            {"bad_words_ids": words, "no_repeat_ngram_size": ngram},
        ):
            tokens, margins = write(model, prompt, **options)
            assert tokens != free, (name, options)
            found.append(
                {
                    "model": name,
                    "prompt": prompt,
                    "bad_words": options.get("bad_words_ids", []),
                    "ngram": options.get("no_repeat_ngram_size", 0),
                    "tokens": tokens,
                    "margins": margins,
                }
            )
    return found


if __name__ == "__main__":
    golden = {"cases": cases(), "written": written()}
    (FIXTURES / "logits_processors.json").write_text(json.dumps(golden) + "\n")
