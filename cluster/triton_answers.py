"""Answers in Triton's protocol: TensorRT-LLM's outputs by name, as tensors over a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from tensorray.cluster.bad_request import BadRequest
from tensorray.cluster.outputs import CompletionOutput, RequestOutput
from tensorray.cluster.triton_fields import Fields
from tensorray.cluster.triton_tensors import InferRequest, Tensor

OUTPUTS = {
    "text_output": ("BYTES", [-1]),
    "cum_log_probs": ("FP32", [-1, -1]),
    "output_log_probs": ("FP32", [-1, -1, -1]),
    "num_input_tokens": ("INT32", [-1, 1]),
    "num_output_tokens": ("INT32", [-1, -1]),
}
ASKED_BY = {
    "cum_log_probs": "return_log_probs",
    "output_log_probs": "return_log_probs",
    "num_input_tokens": "return_num_input_tokens",
    "num_output_tokens": "return_num_output_tokens",
}

_JSON_TYPES: dict[str, Any] = {
    "FP32": float | list[float] | None,
    "INT32": int | list[int] | None,
}
# The generate extension's answer, as the API describes it: lists where there are several values.
GenerateAnswer = msgspec.defstruct(
    "GenerateAnswer",
    [
        ("model_name", str),
        ("model_version", str),
        ("text_output", str | list[str]),
        *(
            (name, _JSON_TYPES[datatype], None)
            for name, (datatype, _) in OUTPUTS.items()
            if name != "text_output"
        ),
        ("id", str, ""),
        ("sequence_id", int, 0),
        ("sequence_start", bool, False),
        ("sequence_end", bool, False),
        ("sequence_index", int, 0),
    ],
)


def wanted_outputs(request: InferRequest, rows: Sequence[Fields]) -> list[str]:
    """The outputs to answer with."""
    if request.outputs is None:
        return [
            name
            for name in OUTPUTS
            if name not in ASKED_BY or any(row.get(ASKED_BY[name]) for row in rows)
        ]
    for output in request.outputs:
        if output.name not in OUTPUTS:
            raise BadRequest(
                f"{output.name[:60]} is no output of this model; there are {', '.join(OUTPUTS)}"
            )
        for name, value in output.parameters.items():
            if name != "binary_data" and value:
                raise BadRequest(f"output {output.name}: {name[:60]} is not supported")
    return [output.name for output in request.outputs]


def begin_with_prompt(fields: Fields, answer: RequestOutput) -> None:
    """Put the prompt before each text, unless told not to."""
    if not fields.get("exclude_input_in_output"):
        for output in answer.outputs:
            output.text = fields["text_input"] + output.text


def output_tensor(name: str, answers: Sequence[RequestOutput]) -> Tensor:
    """An output over the batch. Rows and sequences with fewer tokens are padded with zeros."""
    datatype, _ = OUTPUTS[name]
    batch = len(answers)
    sequences = max(len(answer.outputs) for answer in answers)
    if name == "text_output":
        texts = [output.text for answer in answers for output in answer.outputs]
        return Tensor(name, datatype, [len(texts)], texts)
    if name == "num_input_tokens":
        lengths = [len(answer.prompt_token_ids) for answer in answers]
        return Tensor(name, datatype, [batch, 1], lengths)
    rows = [_padded([_of(name, out) for out in answer.outputs], sequences) for answer in answers]
    if name != "output_log_probs":
        return Tensor(name, datatype, [batch, sequences], [value or 0 for r in rows for value in r])
    longest = max((len(each) for row in rows for each in row if each), default=0)
    flat = [value for row in rows for each in row for value in _padded(each or [], longest, 0.0)]
    return Tensor(name, datatype, [batch, sequences, longest], flat)


def _of(name: str, output: CompletionOutput) -> Any:
    """One sequence's share of an output."""
    if name == "num_output_tokens":
        return len(output.token_ids)
    if name == "cum_log_probs":
        return output.cumulative_logprob
    return [entry.logprob for entry in output.logprobs or [] if entry is not None]


def _padded(values: list[Any], length: int, filler: Any = None) -> list[Any]:
    return values + [filler] * (length - len(values))
