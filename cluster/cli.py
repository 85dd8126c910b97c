"""The `tensorray` command. Each command's work is in a module of its own, imported when it runs,
so that `--help` and mistakes on the command line answer at once."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import os
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel, ValidationError

from tensorray.cluster.build_config import BuildConfig
from tensorray.cluster.command_lines import Command
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.flags import Given, explain, with_flags
from tensorray.cluster.sampling_params import SamplingParams
from tensorray.cluster.usage_error import UsageError

app = typer.Typer(
    name="tensorray",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its panels cut long flags off
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(help="Measure a model in this process, or a server.", no_args_is_help=True)
app.add_typer(bench, name="bench")

ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="YAML file of settings; flags win over it."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Log everything; show tracebacks.")]
InputLen = Annotated[
    str,
    typer.Option(
        "--input-len",
        "--random-input-len",
        metavar="N|LOW:HIGH",
        help="Tokens of a random prompt.",
    ),
]
OutputLen = Annotated[
    str,
    typer.Option(
        "--output-len", "--random-output-len", metavar="N|LOW:HIGH", help="Tokens to generate."
    ),
]
TokenIds = Annotated[
    str, typer.Option(metavar="LOW:HIGH", help="Where a random prompt's token ids come from.")
]
NumPrompts = Annotated[
    int | None,
    typer.Option(min=1, help="Random prompts [default: 64], or lines of the dataset to use."),
]
Dataset = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="Prompts as JSON lines, instead of random ones."),
]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(version("tensorray"))
        raise typer.Exit


@app.callback()
def _tensorray(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it, and stop.")
    ] = False,
) -> None:
    """Serve large language models on a Ray cluster."""


def main() -> None:
    """Run the command line; exit status 0, 1 for a failure, 2 for a mistake of the user's."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nor may the flush at exit fail
        sys.exit(1)


def command(
    group: typer.Typer, name: str | None = None, **models: type[BaseModel]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command: `models` become flags (see `with_flags`), errors become one message."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        flagged = with_flags(**models)(function)

        @functools.wraps(flagged)
        def call(*, debug: bool, **values: Any) -> None:
            logging.basicConfig(
                level=logging.DEBUG if debug else logging.WARNING,
                format="%(levelname)s %(name)s: %(message)s",
                stream=sys.stderr,
            )
            with reported(debug):
                flagged(**values)

        signature = inspect.signature(flagged)
        option = inspect.Parameter(
            "debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Debug
        )
        call.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), option]
        )
        call.__annotations__["debug"] = Debug
        group.command(name or function.__name__.replace("_", "-"), cls=Command)(call)
        return call

    return decorate


@contextlib.contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Print an error as one message and exit: 2 for what the user can correct, else 1."""
    try:
        yield
    except (KeyboardInterrupt, BrokenPipeError):
        raise
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ValidationError):
            message = explain(error)
        else:
            message = str(error) or type(error).__name__
        typer.echo(f"Error: {message}", err=True)
        # Checkpoints, configs and requests that can't be served are ValueErrors.
        mistake = isinstance(error, ValueError | FileNotFoundError | IsADirectoryError)
        sys.exit(2 if mistake else 1)


def engine_config(given: Given, config_file: str | None) -> EngineConfig:
    if config_file is not None:
        return EngineConfig.from_yaml(config_file, **given)
    if "model" not in given:
        raise UsageError("which model? Give --model: a GGUF file, a directory, or a Hub id")
    return EngineConfig(**given)


@command(app, config=EngineConfig)
def serve(
    config: Given,
    path: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Same as --model.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    ssl_certfile: Annotated[
        str | None, typer.Option(metavar="FILE", help="Certificate, to serve HTTPS.")
    ] = None,
    ssl_keyfile: Annotated[
        str | None, typer.Option(metavar="FILE", help="The certificate's private key.")
    ] = None,
    ssl_ca_certs: Annotated[
        str | None, typer.Option(metavar="FILE", help="Whose certificates clients must have.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the whole configuration only.")
    ] = False,
    config_file: ConfigFile = None,
) -> None:
    """Serve a model with the OpenAI API on Ray Serve, until Ctrl-C."""
    if (ssl_certfile is None) != (ssl_keyfile is None):
        raise UsageError("--ssl-certfile and --ssl-keyfile go together")
    if ssl_ca_certs is not None and ssl_certfile is None:
        raise UsageError("--ssl-ca-certs needs --ssl-certfile and --ssl-keyfile")
    if path is not None:
        if "model" in config:
            raise UsageError("the model is given twice: as an argument and as --model")
        config["model"] = path
    engine = engine_config(config, config_file)
    if dry_run:
        from tensorray.cluster import print_config

        print_config.run(engine)
        return

    from tensorray.cluster import app as serving

    tls = None
    if ssl_certfile is not None and ssl_keyfile is not None:
        tls = serving.Tls(ssl_certfile, ssl_keyfile, ssl_ca_certs)
    serving.run(engine, host, port, blocking=True, tls=tls)


@command(app, sampling=SamplingParams, config=EngineConfig)
def generate(
    sampling: Given,
    config: Given,
    prompt: Annotated[str | None, typer.Option(help="Text to complete.")] = None,
    prompts_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help='JSON lines, each {"prompt": ...} or {"prompt_token_ids": [...]}, as one batch.',
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            metavar="ADAPTER",
            help="LoRA adapter to run with: a directory, a Hub id, or a name in --lora-modules.",
        ),
    ] = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """Complete a prompt, or a file of them, in this process.

    A file is one batch. Sampling parameters that no flag sets are the model's own defaults.
    """
    if (prompt is None) == (prompts_file is None):
        raise UsageError("give either --prompt or --prompts-file")
    engine = engine_config(config, config_file)

    from tensorray.cluster import generate as batch

    batch.run(engine, sampling, prompt, prompts_file, lora=lora, as_json=as_json)


@command(app, config=EngineConfig)
def batch(
    config: Given,
    source: Annotated[
        str,
        typer.Option("--input-file", "-i", metavar="FILE", help="Requests, JSON lines."),
    ],
    target: Annotated[
        str,
        typer.Option("--output-file", "-o", metavar="FILE", help="Answers, JSON lines, in order."),
    ],
    config_file: ConfigFile = None,
) -> None:
    """Answer a file of requests, as OpenAI's batches, in this process.

    A line that is no request gets an error line. A run that was killed goes on where it ended.
    Exit status: 0 when every line has its answer or its error, 1 when the engine failed.
    """
    engine = engine_config(config, config_file)

    from tensorray.cluster import batch as files

    files.run(engine, source, target)


@command(bench, config=EngineConfig)
def latency(
    config: Given,
    input_len: InputLen = "128",
    output_len: OutputLen = "128",
    token_ids: TokenIds = "1000:9999",
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    iterations: Annotated[int, typer.Option(min=1, help="Measured runs, after one more.")] = 5,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """How long one batch takes, start to end, in this process."""
    engine = engine_config(config, config_file)

    from tensorray.cluster import bench as measure

    measure.latency(
        engine,
        measure.Lengths.parse(input_len, output_len, token_ids),
        batch_size=batch_size,
        iterations=iterations,
        as_json=as_json,
    )


@command(bench, config=EngineConfig)
def throughput(
    config: Given,
    input_len: InputLen = "100:1024",
    output_len: OutputLen = "100:1024",
    token_ids: TokenIds = "1000:9999",
    num_prompts: NumPrompts = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
    config_file: ConfigFile = None,
) -> None:
    """How many tokens a second come out with everything sent at once, in this process."""
    engine = engine_config(config, config_file)

    from tensorray.cluster import bench as measure

    lengths = measure.Lengths.parse(input_len, output_len, token_ids)
    workload = measure.Workload.make(dataset, num_prompts, lengths, engine.seed or 0)
    measure.throughput(engine, workload, as_json=as_json)


@command(bench, name="serve")
def bench_serve(
    url: Annotated[
        str, typer.Option("--url", "--base-url", help="The server, without /v1.")
    ] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(help="Default: the first it serves.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="Key to send, if it wants one.")
    ] = None,
    request_rate: Annotated[
        float | None,
        typer.Option(help="Requests a second, Poisson arrivals. Default: all at once."),
    ] = None,
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            "--max-concurrency",
            min=1,
            help="Most requests in flight. Default: no limit.",
        ),
    ] = None,
    input_len: InputLen = "128",
    output_len: OutputLen = "128",
    token_ids: TokenIds = "1000:9999",
    num_prompts: NumPrompts = None,
    dataset: Dataset = None,
    seed: Annotated[int, typer.Option(help="Of prompts and arrivals.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Load a server; report time to first token, per token, and between tokens."""
    if request_rate is not None and not request_rate > 0:
        raise UsageError(f"--request-rate must be above 0 (got {request_rate})")

    from tensorray.cluster import bench as measure

    lengths = measure.Lengths.parse(input_len, output_len, token_ids)
    measure.serve(
        url.rstrip("/").removesuffix("/v1"),
        model,
        measure.Workload.make(dataset, num_prompts, lengths, seed),
        api_key=api_key or "",
        rate=request_rate,
        concurrency=concurrency,
        seed=seed,
        as_json=as_json,
    )


@command(app, config=BuildConfig)
def build(
    config: Given,
    path: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Same as --model.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compile a model's engines, on a Ray cluster, ahead of serving.

    Only what the store lacks is compiled, on nodes that can: one with a GPU of the architecture
    for tensorrt, any with a CPU for tensorrt_rtx. Exit status: 0 when every plan is in the store,
    1 when a segment failed to compile (the others are stored) or the store failed, 2 when what is
    asked for can't be built, 143 when stopped.
    """
    if path is not None:
        if "model" in config:
            raise UsageError("the model is given twice: as an argument and as --model")
        config["model"] = path
    if "model" not in config:
        raise UsageError("which model? Give a GGUF file, a directory, or a Hub id")
    settings = BuildConfig(**config)

    from tensorray.cluster import build_command

    build_command.run(settings, as_json=as_json)


@command(app)
def convert(
    source: Annotated[Path, typer.Argument(help="A .nemo archive, a state dict, a directory.")],
    target: Annotated[Path, typer.Argument(metavar="DEST", help="Directory to make.")],
    config_file: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Instead of the source's own config."),
    ] = None,
    vocab_size: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens; rows after them, the trainer's padding, are cut off."),
    ] = None,
    shard_size: Annotated[
        float, typer.Option(min=0.001, metavar="GB", help="Largest file to write.")
    ] = 5.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the mapping only.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert another trainer's checkpoint to safetensors.

    Reads NeMo's archives and distributed checkpoints, Megatron's, Meta's, and PyTorch state dicts,
    and shows what becomes of each tensor. Pickles are read as data: nothing in them is run, and
    what is no tensor is refused by name.
    """
    from tensorray.cluster import convert_command

    convert_command.run(
        source,
        target,
        config=config_file,
        vocab_size=vocab_size,
        shard_bytes=int(shard_size * 1e9),
        dry_run=dry_run,
        as_json=as_json,
    )


@command(app)
def models(
    path: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A GGUF file, directory or Hub id.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List known architectures, or say what a model resolves to."""
    from tensorray.cluster import models as listing

    listing.run(path, as_json=as_json)


@command(app)
def api_key(
    name: Annotated[str, typer.Argument(help="Whose it is, in one word.")],
    file: Annotated[
        str, typer.Option("--api-key-file", metavar="FILE", help="Where to add its digest.")
    ],
) -> None:
    """Make an API key, printed once.

    It is kept nowhere but as a digest in a file.
    """
    from tensorray.cluster import key_digests

    typer.echo(key_digests.add_key(file, name))


@command(app)
def doctor(as_json: AsJson = False) -> None:
    """Say what this machine can run, and what of that has been tested."""
    from tensorray.cluster import doctor as checks

    checks.run(as_json=as_json)


@command(app)
def demo(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port on 127.0.0.1.")] = 8000,
    once: Annotated[bool, typer.Option("--once", help="Stop after the answer.")] = False,
    prompt: Annotated[str, typer.Option(help="What to complete.")] = "Once upon a time",
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    model_path: Annotated[
        bool, typer.Option("--model-path", help="Print where the demo model is, and stop.")
    ] = False,
) -> None:
    """Serve Gemma 3 270M here, and stream one completion."""
    from tensorray.cluster import demo as show

    if model_path:
        typer.echo(show.model_path())
    else:
        show.run(port, once=once, prompt=prompt, max_tokens=max_tokens)


if __name__ == "__main__":
    main()
