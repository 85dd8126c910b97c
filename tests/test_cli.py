"""The command line: flags from fields, one message for a mistake, stdout for results alone."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import pytest
import typer
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from tensorray.cluster import app, cli, doctor
from tensorray.cluster.command_lines import Command as CommandLine
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.elsewhere import ELSEWHERE
from tensorray.cluster.flags import Given, flag, with_flags
from tensorray.cluster.sampling_params import SamplingParams
from tests.helpers.ports import free_port

MODEL = str(Path(__file__).parent / "fixtures" / "models" / "qwen3")
SMALL = ("--model", MODEL, "--num-kv-blocks", "64", "--num-threads", "1")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tensorray(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Run a command line in this process; returns exit status, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tensorray", *arguments])
        try:
            cli.main()
            status = 0
        except SystemExit as leaving:
            status = leaving.code if isinstance(leaving.code, int) else 1
        out, err = capfd.readouterr()
        return status, out, err

    return run


# --- flags ------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["serve"], ["generate"], ["bench", "latency"]])
def test_every_setting_is_a_flag(tensorray: Command, command: list[str]) -> None:
    _, out, _ = tensorray(*command, "--help")
    assert [name for name in EngineConfig.model_fields if flag(name) not in out] == []


def test_every_sampling_parameter_is_a_flag(tensorray: Command) -> None:
    _, out, _ = tensorray("generate", "--help")
    assert [name for name in SamplingParams.model_fields if flag(name) not in out] == []


class Settings(BaseModel):
    depth: int = Field(3, description="How deep")
    color: Literal["red", "green"] = "red"
    fast: bool = True
    tags: list[str] = Field(default_factory=list)
    sizes: dict[str, int] = Field(default_factory=dict)
    note: str | None = None


def parse_settings(*arguments: str) -> tuple[int, Given, str]:
    app = typer.Typer(rich_markup_mode=None)
    seen: list[Given] = []

    @app.command()
    @with_flags(settings=Settings)
    def show(settings: Given, own: Annotated[int, typer.Option()] = 0) -> None:
        seen.append({**settings, "own": own})

    result = CliRunner().invoke(app, arguments)
    return result.exit_code, seen[0] if seen else {}, result.output


def test_flags_follow_the_fields_types() -> None:
    _, given, _ = parse_settings(
        *("--depth", "5", "--color", "green", "--no-fast", "--tags", "a", "--tags", "b"),
        *("--sizes", '{"x": 1}', "--own", "2"),
    )
    settings = Settings(**{name: value for name, value in given.items() if name != "own"})
    assert settings == Settings(depth=5, color="green", fast=False, tags=["a", "b"], sizes={"x": 1})
    assert given["own"] == 2


def test_flags_not_given_are_left_to_others() -> None:
    assert parse_settings()[1] == {"own": 0}


def test_an_argument_that_may_be_left_out_stays_one() -> None:
    """Written out, the annotation is what Python 3.10 makes of one that defaults to None."""
    app = typer.Typer(rich_markup_mode=None)
    seen: list[str | None] = []

    @app.command()
    @with_flags(settings=Settings)
    def show(
        settings: Given,
        path: Optional[Annotated[str | None, typer.Argument()]] = None,  # noqa: UP045
    ) -> None:
        seen.append(path)

    for arguments in (["here"], []):
        assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == ["here", None]


def test_help_shows_defaults_and_choices() -> None:
    _, _, out = parse_settings("--help")
    text = " ".join(out.split())
    assert "How deep [default: 3]" in text
    assert "red|green" in text


def test_flags_win_over_the_config_file(tensorray: Command, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: from-file\nmax_num_seqs: 7\nblock_size: 32\n")
    config = cli.engine_config({"max_num_seqs": "9"}, str(path))
    assert (config.model, config.max_num_seqs, config.block_size) == ("from-file", 9, 32)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["MODEL", "--tags", "a", "b", "--depth", "4"], {"path": "MODEL", "tags": ["a", "b"]}),
        (["--tags", "a", "MODEL"], {"path": "MODEL", "tags": ["a"]}),  # its only word is the model
        (["--tags=a", "--tags", "b"], {"tags": ["a", "b"]}),
        (["--tags", '["a", "b"]'], {"tags": ["a", "b"]}),
        (["--max_depth", "4"], {"max_depth": 4}),
        (["--max-depth", "8k"], {"max_depth": 8000}),
        (["--max-depth=1.5K"], {"max_depth": 1536}),
        (["-tp", "2"], {"tensor_parallel_size": 2}),
    ],
    ids=" ".join,
)
def test_a_line_is_read_as_vllm_reads_it(words: list[str], expected: dict[str, Any]) -> None:
    class Fields(Settings):
        max_depth: int = 1
        tensor_parallel_size: int = 1

    app = typer.Typer(rich_markup_mode=None)
    seen: list[dict[str, Any]] = []

    @app.command(cls=CommandLine)
    @with_flags(fields=Fields)
    def show(fields: Given, path: Annotated[str | None, typer.Argument()] = None) -> None:
        seen.append({**Fields(**fields).model_dump(), "path": path})

    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert expected.items() <= seen[0].items()


def test_no_flag_is_said_to_be_elsewhere_that_is_here(tensorray: Command) -> None:
    """Nor does what is said instead name one that is not."""
    _, out, _ = tensorray("serve", "--help")
    here = set(re.findall(r"--?[a-z][a-z-]*", out))
    assert here >= {"--tensor-parallel-size", "-tp", "--no-enforce-eager"}
    assert not here & set(ELSEWHERE)
    assert set(re.findall(r"--[a-z-]+", " ".join(ELSEWHERE.values()))) <= here


def test_help_is_in_parts(tensorray: Command) -> None:
    assert set(EngineConfig.topics) <= set(EngineConfig.model_fields)
    _, out, _ = tensorray("serve", "--help")
    lora = out[out.index("\nLoRA adapters:") : out.index("\nEmbeddings and scores:")]
    assert "--max-loras" in lora
    assert "--port" not in lora


def test_version(tensorray: Command) -> None:
    assert tensorray("--version") == (0, version("tensorray") + "\n", "")


# --- mistakes ---------------------------------------------------------------------------------

MISTAKES = {
    "no model": (["generate", "--prompt", "x"], "which model? Give --model"),
    "no prompt": (["generate", *SMALL], "either --prompt or --prompts-file"),
    "both prompts": (
        ["generate", *SMALL, "--prompt", "x", "--prompts-file", "y"],
        "either --prompt or --prompts-file",
    ),
    "a word for a number": (
        ["generate", *SMALL, "--prompt", "x", "--max-num-seqs", "many"],
        "--max-num-seqs: Input should be a valid integer",
    ),
    "out of range": (
        ["generate", *SMALL, "--prompt", "x", "--top-p", "1.5"],
        "--top-p: Input should be less than or equal to 1 (got '1.5')",
    ),
    "not a number": (
        ["generate", *SMALL, "--prompt", "x", "--temperature", "nan"],
        "--temperature: Input should be a finite number",
    ),
    "not JSON": (
        ["generate", *SMALL, "--prompt", "x", "--logit-bias", "{1: 2}"],
        "--logit-bias: not JSON",
    ),
    "no such choice": (
        ["generate", *SMALL, "--prompt", "x", "--load-format", "pickle"],
        "--load-format: Input should be 'auto'",
    ),
    "contradiction": (
        ["generate", *SMALL, "--prompt", "x", "--n", "3", "--best-of", "2"],
        "best_of (2) must be at least n (3)",
    ),
    "no such model": (
        ["generate", "--model", "./nowhere", "--prompt", "x"],
        "./nowhere: no such file or directory",
    ),
    "no such prompts file": (["generate", *SMALL, "--prompts-file", "gone"], "gone"),
    "no such config file": (["serve", "--config", "gone.yaml"], "gone.yaml"),
    "model twice": (["serve", "a", "--model", "b"], "the model is given twice"),
    "no server": (
        ["bench", "serve", "--url", "http://127.0.0.1:9"],
        "http://127.0.0.1:9: no server answers",
    ),
    "another server's flag": (
        ["serve", "m", "--quantization", "awq"],
        "no --quantization here; leave it out: the checkpoint says",
    ),
    "another server's name of a flag": (
        ["serve", "m", "--num_gpu_blocks_override=9"],
        "no --num-gpu-blocks-override here; give --num-kv-blocks",
    ),
    "falling range": (
        ["bench", "latency", *SMALL, "--input-len", "9:3"],
        "--input-len must rise from at least 1",
    ),
    "port of none": (["serve", MODEL, "--port", "70000"], "'--port': Input should be less than"),
    "rate of nothing": (["bench", "serve", "--request-rate", "0"], "--request-rate must be above"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_gets_one_message(tensorray: Command, arguments: list[str], message: str) -> None:
    status, out, err = tensorray(*arguments)
    assert message in err
    assert status == 2
    assert out == ""
    assert "Traceback" not in err


@pytest.mark.parametrize("model", [MODEL, "./nowhere"])
def test_serve_looks_at_port_and_model_before_it_starts_ray(
    tensorray: Command, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(app, "joins", lambda: False)  # another test's cluster may be there
    monkeypatch.setattr(app, "connect", lambda: pytest.fail("Ray starts"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1] if model == MODEL else free_port()
        status, out, err = tensorray("serve", model, "--port", str(port))
    assert (status, out) == (2, "")
    used = f"port {port} on 127.0.0.1 can't be used"
    assert (used if model == MODEL else "no such file or directory") in err
    assert "make" not in err


def test_an_unknown_key_of_the_config_file_is_named(tensorray: Command, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: m\nmax_model_length: 7\n")
    status, _, err = tensorray("serve", "--config", str(path))
    assert status == 2
    assert "max-model-length" in err


def test_another_servers_setting_is_answered_with_what_is_here() -> None:
    with pytest.raises(ValueError, match="no quantization here; leave it out: the checkpoint"):
        EngineConfig.model_validate({"model": "m", "quantization": "awq"})


def test_debug_shows_the_traceback(tensorray: Command) -> None:
    with pytest.raises(ValueError, match="no such file"):
        tensorray("generate", "--model", "./nowhere", "--prompt", "x", "--debug")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "malformed"),
        ('{"prompt": 5}', "Expected `str | null`, got `int`"),
        ('{"text": "x"}', 'needs a "prompt"'),
        ('{"prompt_token_ids": ["a"]}', "Expected `int`, got `str`"),
    ],
)
def test_a_bad_line_is_named(tensorray: Command, tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n\n' + line + "\n")
    status, out, err = tensorray("generate", *SMALL, "--prompts-file", str(path))
    assert status == 2
    assert f"{path}:3: " in err
    assert message in err
    assert out == ""


# --- results ----------------------------------------------------------------------------------


def test_generate_prints_one_json_object(tensorray: Command) -> None:
    status, out, _ = tensorray(
        *("generate", *SMALL, "--prompt", "hello there", "--max-tokens", "5"),
        *("--temperature", "0", "--ignore-eos", "--json"),
    )
    assert status == 0
    result = json.loads(out)
    assert set(result) == {"text", "token_ids", "prompt_token_ids", "finish_reason"}
    assert len(result["token_ids"]) == 5
    assert result["finish_reason"] == "length"


def test_generate_prints_text_without_json(tensorray: Command) -> None:
    arguments = ("generate", *SMALL, "--prompt", "hello", "--max-tokens", "5", "--temperature", "0")
    _, as_json, _ = tensorray(*arguments, "--json")
    _, text, _ = tensorray(*arguments)
    assert text == json.loads(as_json)["text"] + "\n"


def test_prompts_come_back_in_order(tensorray: Command, tmp_path: Path) -> None:
    prompts = [[1, 2, 3], [4, 5], [6] * 20, [7, 8, 9]]
    lengths = [9, 1, 3, 2]
    path = tmp_path / "prompts.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt_token_ids": prompt, "max_tokens": length}
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, out, err = tensorray(
        *("generate", *SMALL, "--prompts-file", str(path), "--ignore-eos", "--json")
    )
    assert status == 0, err
    results = [json.loads(line) for line in out.splitlines()]
    assert [result["prompt_token_ids"] for result in results] == prompts
    assert [len(result["token_ids"]) for result in results] == lengths


def test_several_sequences_are_all_printed(tensorray: Command) -> None:
    _, out, _ = tensorray(
        *("generate", *SMALL, "--prompt", "x", "--n", "3", "--seed", "1", "--max-tokens", "4"),
        *("--json",),
    )
    result = json.loads(out)
    assert len(result["outputs"]) == 3
    assert result["outputs"][0]["token_ids"] == result["token_ids"]


def test_logprobs_are_printed_when_asked_for(tensorray: Command) -> None:
    _, out, _ = tensorray(
        *("generate", *SMALL, "--prompt", "x y z", "--temperature", "0", "--max-tokens", "2"),
        *("--logprobs", "2", "--prompt-logprobs", "0", "--json"),
    )
    result = json.loads(out)
    first = result["logprobs"][0]
    assert first["token_id"] == result["token_ids"][0]
    assert first["rank"] == 1
    assert first["top"][0]["logprob"] == first["logprob"]
    assert len(first["top"]) == 2
    assert result["prompt_logprobs"][0] is None
    assert len(result["prompt_logprobs"]) == len(result["prompt_token_ids"])


def test_throughput_counts_what_was_asked_for(tensorray: Command) -> None:
    status, out, err = tensorray(
        *("bench", "throughput", *SMALL, "--num-prompts", "3", "--input-len", "4:8"),
        *("--output-len", "5", "--token-ids", "1:90", "--json"),
    )
    assert status == 0, err
    figures = json.loads(out)
    assert figures["requests"] == 3
    assert figures["output_tokens"] == 15
    assert 12 <= figures["prompt_tokens"] <= 24


def test_latency_reports_each_measure(tensorray: Command) -> None:
    status, out, err = tensorray(
        *("bench", "latency", *SMALL, "--batch-size", "2", "--iterations", "2"),
        *("--input-len", "4", "--output-len", "6", "--token-ids", "1:90", "--json"),
    )
    assert status == 0, err
    figures = json.loads(out)
    # Two runs, so a pause may fall into either: the best first token against the worst batch.
    assert 0 < figures["all_first_tokens_ms"]["p50"] < figures["batch_ms"]["max"]
    assert figures["output_tokens_per_second"] > 0


def test_models_lists_architectures(tensorray: Command) -> None:
    _, out, _ = tensorray("models", "--json")
    assert json.loads(out)["Llama"][0] == "LlamaForCausalLM"


def test_models_says_what_a_model_resolves_to(tensorray: Command) -> None:
    _, out, _ = tensorray("models", MODEL, "--json")
    found = json.loads(out)
    assert found["architecture"] == "Qwen3ForCausalLM"
    assert found["definition"] == "tensorray.builder.models.qwen3:Qwen3"


def test_doctor_reports_this_machine(tensorray: Command) -> None:
    status, out, _ = tensorray("doctor", "--json")
    found = json.loads(out)
    assert status == 0
    assert found["machine"]["threads"] >= 1
    assert found["software"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["can_run"]["models on a GPU"] is False


@pytest.mark.parametrize(
    ("gpu", "runs"),
    [
        ("NVIDIA H200, 143771 MiB, 580.159.04, 9.0", True),
        ("NVIDIA RTX PRO 6000, 97887 MiB, 580.159.04, 12.0", True),
        ("Tesla T4, 15360 MiB, 580.159.04, 7.5", False),
        ("nvidia-smi failed: timed out", False),
    ],
)
def test_doctor_knows_which_gpus_the_kernels_run_on(
    monkeypatch: pytest.MonkeyPatch, gpu: str, runs: bool
) -> None:
    monkeypatch.setattr(doctor, "_gpus", lambda: [gpu])
    monkeypatch.setattr(doctor, "_version", lambda *names: "1.0")
    assert doctor.report()["can_run"]["models on a GPU"] is runs


# --- start-up ---------------------------------------------------------------------------------


def test_help_is_quick() -> None:
    """What makes a start slow is imports."""
    check = (
        "import sys; sys.argv = ['tensorray', '--help']\n"
        "from tensorray.cluster.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('heavy:', *{'ray', 'numpy', 'tokenizers', 'aiohttp', 'fastapi'} & set(sys.modules))"
    )
    answer = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True)
    assert answer.stdout.splitlines()[-1].strip() == "heavy:"


@pytest.mark.parametrize("wrong", [None, SystemExit(0), TimeoutError("not deleted")])
def test_serve_told_to_end_while_it_loads_stops_what_it_started(
    tensorray: Command, monkeypatch: pytest.MonkeyPatch, wrong: BaseException | None
) -> None:
    """Whatever Ray makes of that."""
    stopped: list[bool] = []

    def stop(own_cluster: bool) -> None:
        stopped.append(own_cluster)
        if wrong is not None:
            raise wrong

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(app, "joins", lambda: True)
    monkeypatch.setattr(app, "connect", lambda: True)
    monkeypatch.setattr(app, "stop", stop)
    monkeypatch.setattr(app.serve, "start", lambda **_: None)
    monkeypatch.setattr(app.serve, "run", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    # As Ray does: it would end the tests.
    signal.signal(signal.SIGTERM, lambda *_: pytest.fail("it ends at once"))
    try:
        status, _, err = tensorray("serve", MODEL)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert status == 143
    assert stopped == [True]
    assert "Stopping" in err
