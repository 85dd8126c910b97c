"""What Triton's protocol tells of the server and its model."""

from __future__ import annotations

import msgspec

from tensorray.cluster.triton_answers import OUTPUTS
from tensorray.cluster.triton_fields import DATATYPES, INPUTS, LISTS, MAX_BATCH

_EXTENSIONS = ("binary_tensor_data", "generate", "model_configuration", "parameters")
_CONFIG_TYPES = {"BYTES": "TYPE_STRING"}


class ServerMetadata(msgspec.Struct):
    """Triton's server metadata."""

    version: str
    name: str = "tensorray"
    extensions: list[str] = msgspec.field(default_factory=lambda: list(_EXTENSIONS))


class TensorMetadata(msgspec.Struct):
    """A tensor's shape begins with the batch; -1 is any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(msgspec.Struct):
    """Triton's model metadata."""

    name: str
    versions: list[str]
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]
    platform: str = "tensorray"


class ModelInput(msgspec.Struct):
    name: str
    data_type: str
    dims: list[int]
    optional: bool


class ModelOutput(msgspec.Struct):
    name: str
    data_type: str
    dims: list[int]


class TransactionPolicy(msgspec.Struct):
    decoupled: bool = False


class ModelConfig(msgspec.Struct):
    """The model in the terms of Triton's model configuration; dims are without the batch."""

    name: str
    input: list[ModelInput]
    output: list[ModelOutput]
    platform: str = "tensorray"
    backend: str = "tensorray"
    max_batch_size: int = MAX_BATCH
    model_transaction_policy: TransactionPolicy = msgspec.field(default_factory=TransactionPolicy)


def model(name: str, version: str) -> ModelMetadata:
    """The model's tensors."""
    inputs = [
        TensorMetadata(each, DATATYPES[kind], [-1, -1 if kind in LISTS else 1])
        for each, kind in INPUTS.items()
    ]
    outputs = [TensorMetadata(each, *told) for each, told in OUTPUTS.items()]
    return ModelMetadata(name, [version], inputs, outputs)


def model_config(name: str) -> ModelConfig:
    """The same as a configuration."""
    inputs = [
        ModelInput(
            each,
            _config_type(DATATYPES[kind]),
            [-1 if kind in LISTS else 1],
            optional=each != "text_input",
        )
        for each, kind in INPUTS.items()
    ]
    outputs = [
        ModelOutput(each, _config_type(datatype), shape[1:] or [-1])
        for each, (datatype, shape) in OUTPUTS.items()
    ]
    return ModelConfig(name, inputs, outputs)


def _config_type(datatype: str) -> str:
    return _CONFIG_TYPES.get(datatype, f"TYPE_{datatype}")
