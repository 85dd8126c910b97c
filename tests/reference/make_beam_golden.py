"""Record transformers' beam search on tiny checkpoints of tests/fixtures/models.

Needs torch and transformers, which the project itself does not:

    python tests/reference/make_beam_golden.py

Every case is searched in float32 and in float64; one whose answers differ hangs by rounding and
says nothing about an implementation, so it is left out (and reported).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

FIXTURES = Path(__file__).parents[1] / "fixtures"
MODELS = ("gemma3", "gpt2", "llama3", "qwen3")
WIDTH, TOKENS = 4, 12
END = 1
# Random models end seldom: with more tokens that end, searches finish in every way there is.
ENDS = list(range(END, 272, 12))
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"eos_token_id": [END]},
    "no length penalty": {"length_penalty": 0.0, "eos_token_id": ENDS},
    "length penalty 1": {"length_penalty": 1.0, "eos_token_id": ENDS},
    "length penalty 2": {"length_penalty": 2.0, "eos_token_id": ENDS},
    "length penalty -1": {"length_penalty": -1.0, "eos_token_id": ENDS},
    "early stopping": {"early_stopping": True, "eos_token_id": ENDS},
    "never early": {"early_stopping": "never", "eos_token_id": ENDS},
    "never early, penalty 2": {
        "early_stopping": "never",
        "length_penalty": 2.0,
        "eos_token_id": ENDS,
    },
    "repetition": {"repetition_penalty": 1.4, "eos_token_id": ENDS},
    "minimum": {"min_new_tokens": 5, "eos_token_id": ENDS},
}


def search(model: Any, prompt: list[int], settings: dict[str, Any]) -> tuple[list[list[int]], Any]:
    """The answers' tokens, with the one that ended each, and their scores, best first."""
    ends = settings["eos_token_id"]
    model.generation_config = transformers.GenerationConfig(pad_token_id=-1)
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        found = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            num_beams=WIDTH,
            num_return_sequences=WIDTH,
            max_new_tokens=TOKENS,
            output_scores=True,
            return_dict_in_generate=True,
            pad_token_id=END,
            **settings,
        )
    answers = []
    for row in found.sequences[:, len(prompt) :].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), len(row) - 1)
        least = settings.get("min_new_tokens", 0)
        assert end + 1 >= least
        answers.append(row[: end + 1])
    return answers, found.sequences_scores.double().tolist()


def cases_of(name: str) -> list[dict[str, Any]]:
    directory = FIXTURES / "models" / name
    load = transformers.AutoModelForCausalLM.from_pretrained
    models = [load(directory, dtype=dtype).eval() for dtype in (torch.float32, torch.float64)]
    cases = []
    with np.load(directory / "reference.npz") as arrays:
        prompts = [arrays[f"prompt_{i}"].tolist() for i in range(3)]
    for number, prompt in enumerate(prompts):
        for kind, settings in SETTINGS.items():
            (answers, scores), (exact, _) = (search(model, prompt, settings) for model in models)
            if answers != exact:
                print(f"{name}, prompt {number}, {kind}: a near-tie, left out")
                continue
            case = {"prompt": number, "kind": kind, "settings": settings}
            cases.append({**case, "answers": answers, "scores": scores})
    return cases


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    golden = {name: cases_of(name) for name in MODELS}
    print({name: len(cases) for name, cases in golden.items()})
    (FIXTURES / "beam_search.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n")
