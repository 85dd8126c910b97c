"""Record what transformers generates greedily with Gemma 3 270M: the fixture of test_gemma_golden.

    python tests/reference/make_gemma_golden.py GGUF_FILE [OUTPUT]

Per prompt: its token ids, the greedy tokens, and at each of them the distance between the two
largest logits. Where that margin is small, another order of summation may pick the other token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers_gemma import load

NEW_TOKENS = 48
STORY = (
    "The lighthouse keeper wrote in the log every evening, whether or not a ship had passed. "
    "On the first page he noted the wind, on the second the state of the lamp, and on the third "
    "whatever he had thought about during the day. "
)
PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a village at the edge of a dark forest,",
    "def fibonacci(n: int) -> int:\n    ",
    "Water boils at a temperature of",
    "Q: What is the largest planet in the solar system?\nA:",
    "La capitale de l'Italie est",
    "Die Geschichte der Stadt Hamburg beginnt",
    "日本の首都は",
    "The three laws of motion are:\n1.",
    "SELECT name, COUNT(*) FROM orders",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8, 13,",
    "🎉 Happy birthday! 🎂",
    "import numpy as np\n\nx = np.array([1, 2, 3])\nprint(",
    "In 1969, Neil Armstrong",
    "Ingredients:\n- 2 eggs\n- 200 g flour\n- 1 pinch of salt\n\nMethod:",
    "<html>\n<head>\n<title>",
    "To be, or not to be,",
    "I",
    # Longer than the local layers' window of 512 tokens.
    STORY * 12 + "Years later, the log was found by",
]


@torch.no_grad()
def main(gguf_file: str, output: str) -> None:
    model, tokenizer = load(gguf_file)
    records = []
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        result = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
        top = torch.stack([logits[0].topk(2).values for logits in result.logits])
        prompt_ids = inputs.input_ids[0].tolist()
        tokens = result.sequences[0, len(prompt_ids) :].tolist()
        margins = [round(margin, 6) for margin in (top[:, 0] - top[:, 1]).tolist()]
        records.append(
            {
                "prompt": prompt,
                "prompt_token_ids": prompt_ids,
                "token_ids": tokens,
                "margins": margins,
                "text": tokenizer.decode(tokens, skip_special_tokens=True),
            }
        )
        print(f"{len(prompt_ids)} + {len(tokens)}, least margin {min(margins)}", file=sys.stderr)
    golden = {
        "model": Path(gguf_file).name,
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "max_tokens": NEW_TOKENS,
        "records": records,
    }
    text = json.dumps(golden, ensure_ascii=False)
    # A line a record, so that a change shows where it is.
    Path(output).write_text(text.replace('{"prompt"', '\n{"prompt"') + "\n")


if __name__ == "__main__":
    default = Path(__file__).parent.parent / "fixtures" / "gemma3_270m_golden.json"
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else str(default))
