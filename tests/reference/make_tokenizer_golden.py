"""Writes tests/fixtures/tokenizers/*.json: how llama.cpp cuts text with a GGUF file's tokenizer.

    pip install xllamacpp gguf tokenizers    # llama.cpp in a wheel
    python make_tokenizer_golden.py path/to/gemma-3-270m-q4_k_m.gguf

`gemma3_270m.json` has the demo model's tokens for many texts. `pre_tokenizers.json` has a small
byte-level vocabulary whose merges run across words, and its tokens under each pre-tokenizer: the
same merges give other tokens wherever text is cut elsewhere. Left out of the latter are texts with
combining marks or wide spaces, where llama.cpp departs from the models' own tokenizers (it knows no
NFC, reads `\\p{M}` as a letter, and finds no wide space in a range of characters).
"""

from __future__ import annotations

import json
import sys
import tempfile
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import xllamacpp
from tokenizers import Tokenizer, models, trainers

FIXTURES = Path(__file__).parent.parent / "fixtures" / "tokenizers"
PRE_TOKENIZERS = [
    "default",
    "llama-bpe",
    "chatglm-bpe",
    "qwen2",
    "stablelm2",
    "gpt-2",
    "smollm",
    "tekken",
    "gpt-4o",
    "deepseek-llm",
    "deepseek-coder",
    "deepseek-v3",
]
TEXTS = [
    "Hello, world! Hello world",
    "   leading and trailing   ",
    "runs   of    spaces     here",
    "\n",
    "\n\n\nline one\nline two\r\nline three\rend\n\n",
    "\t\ttabs\tand  spaces \t mixed \n  x",
    "def f(x):\n    if x:\n        return x ** 2\n\n\nprint(f(3))",
    "1234567890 12 345 6 7890123",
    "3.14159 2,718,281 0x1F 1e-9 v2.0",
    "don't we'll they've I'm you're he'd it's",
    "DON'T SHOUT camelCase MixedCASE HTTPServer2",
    "naïve café Ünïcödé Привет, мир!",
    "你好，世界！今天天气很好。こんにちは カタカナ 안녕하세요",
    "مرحبا שלום ქართული Հայերեն",
    "😀😃 emoji 🎉 👍🏽",
    "https://example.com/path?query=1&x=[a,b]#frag user@example.com",
    '{"key": [1, 2.5, null, true]} <a href="x">',
    "!!!???...,,,;;;:::---___===+++*** $100 €200",
    "x\u00a0non-breaking ＦＵＬＬ １２３",
    "∀x∈ℝ: x² ≥ 0 ⇒ ∑ ½ ™ Ⅷ",
]


class LlamaCpp:
    """llama.cpp with one GGUF file, for its tokenizer."""

    def __init__(self, path: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx = 256
        params.cpuparams.n_threads = 1
        params.warmup = False
        self._server = xllamacpp.Server(params)

    def tokenize(self, text: str) -> list[int]:
        body = {"content": text, "add_special": False, "parse_special": False}
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            tokens: list[int] = json.load(answer)["tokens"]
        return tokens


def write_model(path: Path, pre: str, tokens: Sequence[str], merges: Sequence[str]) -> None:
    """The smallest model llama.cpp loads, with a byte-level tokenizer."""
    width, heads = 32, 1
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    for name in ("attn_norm", "ffn_norm"):
        shapes[f"blk.0.{name}"] = (width,)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"):
        shapes[f"blk.0.{name}"] = (width, width)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_vocabulary() -> tuple[list[str], list[str]]:
    """Byte-level tokens and merges, learned from the texts without cutting them into words."""
    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=list(alphabet.values()), show_progress=False
    )
    spelled = ["".join(alphabet[byte] for byte in text.encode()) for text in TEXTS]
    tokenizer.train_from_iterator(spelled * 2, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), merges


def byte_alphabet() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(0x100 + i) for i, byte in enumerate(others)
    }


def write_json(name: str, value: object) -> None:
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"))
    (FIXTURES / name).write_text(text.replace('],"', '],\n"').replace("}},", "}},\n") + "\n")


def main() -> None:
    FIXTURES.mkdir(parents=True, exist_ok=True)
    gemma = FIXTURES / "gemma3_270m.json"
    engine = LlamaCpp(Path(sys.argv[1]))
    texts = [case["text"] for case in json.loads(gemma.read_text("utf-8"))]
    cases = [{"text": text, "ids": engine.tokenize(text)} for text in texts]
    lines = [json.dumps(case, separators=(",", ":")) for case in cases]
    gemma.write_text("[\n" + ",\n".join(lines) + "\n]\n")

    tokens, merges = small_vocabulary()
    ids = {}
    with tempfile.TemporaryDirectory() as directory:
        for pre in PRE_TOKENIZERS:
            path = Path(directory) / f"{pre}.gguf"
            write_model(path, pre, tokens, merges)
            engine = LlamaCpp(path)
            ids[pre] = [engine.tokenize(text) for text in TEXTS]
    write_json(
        "pre_tokenizers.json", {"tokens": tokens, "merges": merges, "texts": TEXTS, "ids": ids}
    )


if __name__ == "__main__":
    main()
