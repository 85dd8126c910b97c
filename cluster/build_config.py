"""BuildConfig: what plans to build, for whom; fields are flags of `tensorray build`."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def _split(value: Any) -> Any:
    """ "a,b" and ["a,b", "c"] as lists of single names."""
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    return [part.strip() for item in items for part in str(item).split(",") if part.strip()]


def _architectures(names: list[str]) -> list[str]:
    for name in names:
        if not re.fullmatch(r"sm_\d{2,3}", name):
            raise ValueError(
                f"{name} is not a GPU architecture; they are written as sm_89 (L4, L40S, RTX 40), "
                "sm_90 (H100, H200), sm_120 (RTX 50, RTX PRO 6000)"
            )
    return list(dict.fromkeys(names))


def _profiles(texts: list[str]) -> list[str]:
    for text in texts:
        if not re.fullmatch(r"\d+:\d+:\d+", text):
            raise ValueError(f"{text} is not SMALLEST:BEST:LARGEST, as 1:16:256")
    return texts


class BuildConfig(BaseModel):
    """What to build plans for. Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    # --- model ---
    model: str = Field(description="A Hub id, a local directory in Hub layout, or a GGUF file")
    model_class: str | None = Field(
        None, description="Your own definition, as pkg.module:Class or path/to/file.py:Class"
    )
    revision: str | None = Field(None, description="Branch, tag or commit on the Hub")
    hf_token: str | None = Field(
        None, description="Hub token (default: the environment's)", repr=False
    )
    download_dir: str | None = Field(None, description="Hub cache directory")
    offline: bool = Field(False, description="Use the Hub cache only")
    hf_overrides: dict[str, Any] = Field(
        default_factory=dict, description="Keys to set in the model's config (JSON)"
    )
    config_only: bool = Field(
        False,
        description="A local directory needs no weights, just config.json (a Hub model's weights "
        "are never fetched)",
    )
    # --- layout and precision ---
    tp: int = Field(1, ge=1, description="Tensor-parallel ranks")
    pp: int = Field(1, ge=1, description="Pipeline stages")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of weights and products; auto: the checkpoint's"
    )
    residual_dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Of the residual stream; auto, which is what shards run: the dtype, or float32 "
        "under float16 for models that may overflow it",
    )
    # --- what to build for ---
    target: Annotated[list[str], BeforeValidator(_split), AfterValidator(_architectures)] = Field(
        min_length=1, description="GPU architectures, as sm_90,sm_120"
    )
    flavour: Literal["auto", "tensorrt", "tensorrt_rtx"] = Field(
        "auto",
        description="auto: tensorrt where a node has it and a GPU of the target, else tensorrt_rtx",
    )
    max_num_seqs: int = Field(256, ge=1, description="Sequences running at once: rows of a decode")
    max_num_batched_tokens: int = Field(8192, ge=1, description="Most tokens a step may run")
    profiles: Annotated[list[str], BeforeValidator(_split), AfterValidator(_profiles)] = Field(
        default_factory=list,
        description="Numbers of rows plans are made for, as SMALLEST:BEST:LARGEST,…, instead of "
        "those that follow from --max-num-seqs and --max-num-batched-tokens",
    )
    # --- the job ---
    store: str | None = Field(
        None,
        description="Directory or fsspec URL of the plans (default: $TENSORRAY_STORE, or "
        "~/.cache/tensorray/plans)",
    )
    dry_run: bool = Field(False, description="Say what is there and what is missing; build nothing")
