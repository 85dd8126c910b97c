"""Models on the Hugging Face Hub: fetched once into the Hub's cache, then read from there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from tensorray.builder.checkpoint import pickles, safetensors
from tensorray.builder.checkpoint.base import CheckpointError
from tensorray.builder.checkpoint.config import CONFIG

#: Config, tokenizer, chat template: all that is needed but the weights. Top level only.
SMALL_FILES = ["*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt"]
_ELSEWHERE = ["*/*"]  # original/, onnx/, checkpoints of a training run
_ONCE = "fetch it once without --offline, or point --download-dir at the cache that has it"


def download(
    model: str,
    *,
    weights: bool,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
    progress: bool = False,
) -> Path:
    """Fetch a model of the Hub; returns its directory in the cache, or its GGUF file.

    `model` is `org/name`, or `org/name/file.gguf` for one file of a repository of GGUF files.
    Without `weights` only the small files are fetched. With `offline` nothing is asked of the
    network. Raises CheckpointError saying what was tried and what to do.
    """
    parts = model.split("/")
    repo = "/".join(parts[:2])
    tried = f"{model!r} (as a Hub id{f', revision {revision}' if revision else ''})"
    with _progress_bars(progress), _clear_errors(tried, offline):
        if len(parts) > 2:
            return Path(
                hf_hub_download(
                    repo,
                    "/".join(parts[2:]),
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=offline,
                )
            )

        def fetch(patterns: list[str], ignore: list[str], revision: str | None) -> Path:
            return Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    token=token,
                    cache_dir=cache_dir,
                    local_files_only=offline,
                    allow_patterns=patterns,
                    ignore_patterns=ignore,
                )
            )

        directory = fetch(SMALL_FILES, _ELSEWHERE, revision)
        commit = directory.name  # from here on, whatever is pushed meanwhile
        if weights and (directory / safetensors.INDEX).is_file():
            index = safetensors.read_index(directory / safetensors.INDEX)
            fetch(sorted(set(index.values())), [], commit)
        elif weights:
            fetch([safetensors.SINGLE], [], commit)
        has_weights = bool(safetensors.weight_files(directory)) if weights else True
        if not (has_weights and (directory / CONFIG).is_file()):
            if offline:
                raise CheckpointError(f"{tried}: only parts of it are in the Hub cache; {_ONCE}")
            files = HfApi(token=token).list_repo_files(repo, revision=commit)
            raise CheckpointError(_what_is_missing(repo, files))
    return directory


def download_files(
    repo: str,
    files: list[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | None = None,
    offline: bool = False,
) -> Path:
    """Fetch files of a repository's top level, as far as it has them; returns their directory.

    Raises CheckpointError as `download` does.
    """
    tried = f"{repo!r} (as a Hub id{f', revision {revision}' if revision else ''})"
    with _progress_bars(False), _clear_errors(tried, offline):
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=offline,
                allow_patterns=files,
            )
        )


def _what_is_missing(repo: str, files: list[str]) -> str:
    gguf = [file for file in files if file.endswith(".gguf")]
    if gguf:
        some = ", ".join(f"{repo}/{file}" for file in gguf[:5])
        return f"{repo}: a repository of GGUF files; name one of them as the model: {some}"
    if CONFIG not in files:
        return f"{repo}: the repository has no {CONFIG}: not a model that can be served"
    if any(file.endswith(pickles.SUFFIXES) for file in files):
        return pickles.refusal(repo)
    return f"{repo}: the repository has neither safetensors nor GGUF files"


@contextmanager
def _progress_bars(shown: bool) -> Iterator[None]:
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _clear_errors(tried: str, offline: bool) -> Iterator[None]:
    """Turn the Hub library's many exceptions into one sentence each: what was tried, what to do."""
    try:
        yield
    except HFValidationError as error:
        raise CheckpointError(
            f"{tried}: neither a local file or directory nor a valid Hub id: {error}"
        ) from error
    except GatedRepoError as error:
        raise CheckpointError(
            f"{tried}: a gated model: accept its terms on its Hub page, then pass a token "
            f"(--hf-token or HF_TOKEN)"
        ) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{tried}: there is no such local path, and no such model on the Hub (a private one "
            f"needs a token: --hf-token or HF_TOKEN)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{tried}: no such revision; check --revision (branch, tag or commit)"
        ) from error
    except LocalEntryNotFoundError as error:
        reason = str(error.__cause__ or error).partition("\n")[0]
        problem = (
            f"offline is set: {_ONCE}"
            if offline
            else f"the Hub can't be reached ({reason}): check the network, or pass a local "
            f"directory or GGUF file"
        )
        raise CheckpointError(
            f"{tried}: there is no such local path, it is not in the Hub cache, and {problem}"
        ) from error
    except EntryNotFoundError as error:
        raise CheckpointError(f"{tried}: the repository has no such file") from error
    except CheckpointError:
        raise
    except Exception as error:  # the HTTP client's own errors have no base class to rely on
        raise CheckpointError(f"{tried}: the download failed: {error!r}") from error
