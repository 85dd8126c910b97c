"""What requests in Triton's protocol may say: TensorRT-LLM's inputs by name, their types, and which
are refused.

https://github.com/triton-inference-server/tensorrtllm_backend/blob/main/docs/model_config.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.triton_tensors import FLOATS, INTEGERS, Tensor

MAX_BATCH = 128

Fields = dict[str, Any]
Kind = Literal["text", "words", "integer", "integers", "number", "flag", "numbers"]
DATATYPES: dict[Kind, str] = {
    "text": "BYTES",
    "words": "BYTES",
    "integer": "INT32",
    "integers": "INT32",
    "number": "FP32",
    "numbers": "FP32",
    "flag": "BOOL",
}
# Inputs that may have any number of values; the others have one.
LISTS: tuple[Kind, ...] = ("words", "integers", "numbers")
_ITEMS: dict[Kind, Kind] = {"words": "text", "integers": "integer", "numbers": "number"}

INPUTS: dict[str, Kind] = {
    "text_input": "text",
    "max_tokens": "integer",
    "num_return_sequences": "integer",
    "beam_width": "integer",
    "length_penalty": "number",
    "early_stopping": "flag",
    "beam_search_diversity_rate": "number",
    "bad_words": "words",
    "bad_words_list": "integers",  # the words' tokens, then where each ends, then -1
    "no_repeat_ngram_size": "integer",
    "stop_words": "words",
    "exclude_input_in_output": "flag",
    "end_id": "integer",
    "pad_id": "integer",  # there is no padding here, so any will do
    "top_k": "integer",
    "top_p": "number",
    "temperature": "number",
    "repetition_penalty": "number",
    "presence_penalty": "number",
    "frequency_penalty": "number",
    "min_tokens": "integer",
    "min_length": "integer",  # min_tokens' older name
    "seed": "integer",
    "random_seed": "integer",  # seed's older name
    "embedding_bias_words": "words",
    "embedding_bias_weights": "numbers",
    "guided_decoding_guide_type": "text",
    "guided_decoding_guide": "text",
    "return_log_probs": "flag",
    "return_num_input_tokens": "flag",
    "return_num_output_tokens": "flag",
    "stream": "flag",
}
_JSON_TYPES: dict[Kind, Any] = {
    "text": str,
    "words": str | list[str],
    "integer": int,
    "integers": list[int | list[int]],
    "number": float,
    "numbers": float | list[float],
    "flag": bool,
}
# The generate extension's body, as the API describes it; `checked_fields` checks it.
GenerateBody = msgspec.defstruct(
    "GenerateBody",
    [
        ("text_input", str),
        *(
            (name, _JSON_TYPES[kind] | None, None)
            for name, kind in INPUTS.items()
            if name != "text_input"
        ),
        ("id", str, ""),
        ("parameters", dict[str, Any] | None, None),
    ],
)

# The others: the values that ask for nothing, and why any other is refused.
_OFF: tuple[object, ...] = (None, False, 0, "", 0.0)
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "decoder_text_input": (_OFF, "only decoder models are served"),
    "image_input": ((None,), "only text is taken"),
    "image_bytes_input": ((None,), "only text is taken"),
    "image_url_input": (_OFF, "only text is taken"),
    "video_bytes_input": ((None,), "only text is taken"),
    "top_p_min": (_OFF, "top_p does not decay here"),
    "top_p_decay": ((None, 0, 1), "top_p does not decay here"),
    "top_p_reset_ids": ((None,), "top_p does not decay here"),
    "return_context_logits": (_OFF, "logits are not returned; use return_log_probs"),
    "return_generation_logits": (_OFF, "logits are not returned; use return_log_probs"),
    "return_perf_metrics": (_OFF, "/metrics has latencies"),
    "prompt_embedding_table": ((None,), "prompt tables are not supported"),
    "prompt_table_extra_id": (_OFF, "prompt tables are not supported"),
    "prompt_vocab_size": (_OFF, "prompt tables are not supported"),
    "lora_task_id": (_OFF, "adapters are models of their own; ask /v1/completions for one by name"),
    "lora_weights": ((None,), "adapters are loaded by the server, not sent with requests"),
    "lora_config": ((None,), "adapters are loaded by the server, not sent with requests"),
    "num_draft_tokens": (_OFF, "guesses are the server's own (--speculative-config)"),
    "use_draft_logits": (_OFF, "guesses are the server's own (--speculative-config)"),
    "sequence_id": (_OFF, "requests have no state; send the whole prompt"),
    "sequence_start": ((None, False, True), "requests have no state"),
    "sequence_end": ((None, False, True), "requests have no state"),
    "timeout": (_OFF, "send it as the header X-Request-Timeout, in seconds"),
}


def batch_rows(inputs: Sequence[Tensor]) -> list[Fields]:
    """The fields of each row of the batch."""
    by_name = {tensor.name: tensor for tensor in inputs}
    if len(by_name) != len(inputs):
        raise BadRequest("an input is there twice")
    text = by_name.get("text_input")
    if text is None:
        raise BadRequest("the input text_input is missing", param="text_input")
    batch = text.shape[0] if len(text.shape) > 1 else 1
    if not 1 <= batch <= MAX_BATCH:
        raise BadRequest(f"a batch of {batch} is not within 1 to {MAX_BATCH}", param="text_input")
    rows: list[Fields] = [{} for _ in range(batch)]
    for tensor in inputs:
        shape = tensor.shape if len(tensor.shape) > 1 else [1, *tensor.shape]
        if shape[0] != batch:
            raise BadRequest(
                f"{tensor.name}: its shape {list(tensor.shape)} does not begin with the batch of "
                f"{batch}",
                param=tensor.name,
            )
        kind = INPUTS.get(tensor.name)
        if kind is not None and not _fits(kind, tensor.datatype):
            raise BadRequest(
                f"{tensor.name}: the datatype is {tensor.datatype[:40]}, not {DATATYPES[kind]}",
                param=tensor.name,
            )
        width = len(tensor.values) // batch
        for i, row in enumerate(rows):
            values = list(tensor.values[i * width : (i + 1) * width])
            row[tensor.name] = values[0] if width == 1 and kind not in LISTS else values
    rows = [checked_fields(row) for row in rows]
    if any(row.get("stream") for row in rows):
        raise BadRequest("stream: infer answers at once; use generate_stream", param="stream")
    return rows


def _fits(kind: Kind, datatype: str) -> bool:
    if kind in ("integer", "integers"):
        return datatype in INTEGERS
    if kind in ("number", "numbers"):
        return datatype in FLOATS
    return datatype == DATATYPES[kind]


def checked_fields(sent: Fields) -> Fields:
    """The fields that ask for something, checked. Raises BadRequest for what is not supported."""
    fields: Fields = {}
    for name, value in sent.items():
        if name in _REFUSED:
            neutral, why = _REFUSED[name]
            if not any(value == off for off in neutral):
                raise BadRequest(f"{name}: {why}", param=name)
        elif name not in INPUTS:
            raise BadRequest(
                f"{name[:60]} is no input of this model; see its metadata under /v2/models",
                param=name[:60],
            )
        elif value is not None:
            fields[name] = _checked(name, INPUTS[name], value)
    if not isinstance(fields.get("text_input"), str):
        raise BadRequest("text_input is missing; send the prompt's text", param="text_input")
    return fields


def _checked(name: str, kind: Kind, value: Any) -> Any:
    """JSON has no types of its own; what a tensor held passes as well."""
    if kind in LISTS:
        values = value if isinstance(value, list) else [value]
        if kind == "integers" and all(isinstance(item, list) for item in values):
            values = [number for item in values for number in item]
        return [_checked(name, _ITEMS[kind], item) for item in values]
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    types: dict[Kind, tuple[type, ...]] = {
        "text": (str,),
        "flag": (bool,),
        "integer": (int,),
        "number": (int, float),
    }
    if type(value) not in types[kind]:
        raise BadRequest(
            f"{name}: {str(value)[:40]!r} is not {DATATYPES[kind]}",
            param=name,
        )
    return value


def request_priority(parameters: Fields) -> int:
    """Of an inference request's parameters, the one that does something."""
    for name, value in parameters.items():
        if name == "binary_data_output":
            continue
        if name == "priority" and type(value) is int and 0 <= value < 1 << 31:
            continue
        neutral, why = _REFUSED.get(name, ((), "it means nothing here; leave it out"))
        if not any(value == off for off in neutral):
            raise BadRequest(f"parameter {name[:60]}: {why}", param=name[:60])
    return int(parameters.get("priority", 0))
