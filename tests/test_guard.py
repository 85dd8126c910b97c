"""Keys, their limits, bounded headers, other sites, TLS: who gets in, and what the others hear."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tensorray.cluster import app, cli
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.errors import ApiError
from tensorray.cluster.guard import HEADER_BYTES, Allowance
from tensorray.cluster.key_digests import add_key, digest, read_keys
from tests.helpers.null_engine import serving, write_model

COMPLETIONS = "/v1/completions"
HI = {"prompt": "Hi", "max_tokens": 2}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "tiny")


# --- keys -------------------------------------------------------------------------------------


async def test_keys_are_asked_for(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    alice = add_key(file, "alice")
    limits = {"api_key": ["secret"], "api_key_file": str(file)}
    async with serving(model, limits=limits) as (client, _):
        for key in ("secret", alice):
            answer = await client.post(COMPLETIONS, json=HI, headers=bearer(key))
            assert answer.status_code == 200, answer.text
        refused: list[dict[str, str]] = [
            {},
            bearer(""),
            bearer("secrets"),
            bearer(digest("secret")),  # who reads the file has no key
            {"Authorization": "Basic secret"},
            {"Authorization": "secret"},
        ]
        for headers in refused:
            answer = await client.post(COMPLETIONS, json=HI, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            error = answer.json()["error"]
            assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_api_key")
        for path in ("/v1/models", "/metrics", "/openapi.json", "/v2/models/tiny", "/nothing"):
            assert (await client.get(path)).status_code == 401, path
            assert (await client.get(path, headers=bearer("secret"))).status_code != 401, path
        for path in ("/health", "/version", "/v2/health/live", "/v2/health/ready"):
            assert (await client.get(path)).status_code == 200, path


async def test_a_path_prefix_does_not_open_what_is_closed(model: Path) -> None:
    async with serving(model, limits={"api_key": ["secret"]}) as (client, _):
        for path in ("/health/../v1/models", "//v1/models", "/web/../v1/models", "/web/a/b"):
            assert (await client.get(path)).status_code == 401, path


def test_no_key_is_kept(tmp_path: Path) -> None:
    config = EngineConfig(model="m", api_key=["secret", digest("other")])
    assert config.api_key == [digest("secret"), digest("other")]
    assert "secret" not in f"{config!r} {config.model_dump_json()}"
    key = add_key(tmp_path / "keys", "alice")
    assert key not in (tmp_path / "keys").read_text()
    assert (tmp_path / "keys").stat().st_mode & 0o077 == 0
    assert len({add_key(tmp_path / "keys", name) for name in ("bob", "carol")}) == 2
    assert list(read_keys(tmp_path / "keys").values()) == ["alice", "bob", "carol"]
    with pytest.raises(ValueError, match="a key named bob already"):
        add_key(tmp_path / "keys", "bob")


@pytest.mark.parametrize("text", ["", "# none\n", "secret alice\n", f"{digest('a')} a b\n"])
def test_files_that_hold_no_digests(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ValueError, match="keys") as raised:
        read_keys(tmp_path / "keys")
    assert "secret" not in str(raised.value)


def test_settings_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="limits a key need keys"):
        EngineConfig(model="m", api_key_concurrency=2)
    with pytest.raises(ValueError, match="must not be empty"):
        EngineConfig(model="m", api_key=[""])


def test_the_command_makes_a_key(tmp_path: Path) -> None:
    file = str(tmp_path / "keys")
    made = CliRunner().invoke(cli.app, ["api-key", "alice", "--api-key-file", file])
    assert made.exit_code == 0, made.output
    assert read_keys(file) == {digest(made.output.strip()): "alice"}


# --- limits -----------------------------------------------------------------------------------


def test_requests_a_minute_fill_up_steadily() -> None:
    now = 0.0
    allowance = Allowance(6, None, clock=lambda: now)
    for _ in range(6):
        allowance.take()
    with pytest.raises(ApiError, match="6 requests a minute") as raised:
        allowance.take()
    assert (raised.value.status, raised.value.headers["Retry-After"]) == (429, "10")
    now = 9.9
    with pytest.raises(ApiError):
        allowance.take()
    now = 10.1
    allowance.take()
    now = 1e6  # an idle hour does not add up
    for _ in range(6):
        allowance.take()
    with pytest.raises(ApiError):
        allowance.take()


async def test_limits_are_each_keys_own(model: Path) -> None:
    limits = {"api_key": ["a", "b"], "api_key_requests_per_minute": 2}
    async with serving(model, limits=limits) as (client, _):
        for key, expected in (("a", 200), ("a", 200), ("a", 429), ("b", 200)):
            answer = await client.post(COMPLETIONS, json=HI, headers=bearer(key))
            assert answer.status_code == expected
        answer = await client.post(COMPLETIONS, json=HI, headers=bearer("a"))
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(answer.headers["Retry-After"]) <= 30
        assert (await client.get("/v1/models", headers=bearer("a"))).status_code == 200


async def test_a_stream_counts_until_it_ends_or_its_client_leaves(model: Path) -> None:
    limits = {"api_key": ["a"], "api_key_concurrency": 1}
    long = {"prompt": "Hi", "max_tokens": 200, "ignore_eos": True, "stream": True}
    async with serving(model, limits=limits, step_ms=5) as (client, backend):
        first = asyncio.ensure_future(client.post(COMPLETIONS, json=long, headers=bearer("a")))
        while not backend.engine.scheduler.unfinished:
            await asyncio.sleep(0.01)
        answer = await client.post(COMPLETIONS, json=HI, headers=bearer("a"))
        assert (answer.status_code, first.done()) == (429, False)
        assert "1 requests at once" in answer.json()["error"]["message"]
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        answer = await client.post(COMPLETIONS, json=HI, headers=bearer("a"))
        assert answer.status_code == 200
        assert (await client.post(COMPLETIONS, json=long, headers=bearer("a"))).status_code == 200
        answer = await client.post(COMPLETIONS, json={}, headers=bearer("a"))
        assert answer.status_code == 400  # and an error gives its place back
        answer = await client.post(COMPLETIONS, json=HI, headers=bearer("a"))
        assert answer.status_code == 200


# --- bounds, other sites, logs ----------------------------------------------------------------


async def test_headers_are_bounded(model: Path) -> None:
    async with serving(model) as (client, _):
        assert (await client.get("/health", headers={"X": "a" * 1000})).status_code == 200
        for extra in ({"X": "a" * HEADER_BYTES}, {f"X{i}": "a" * 500 for i in range(70)}):
            answer = await client.get("/health", headers=extra)
            assert answer.status_code == 431
            assert answer.json()["error"]["code"] == "headers_too_large"
        assert (await client.get("/health?" + "a" * HEADER_BYTES)).status_code == 431


async def test_other_sites_pages_are_let_in_by_name_only(model: Path) -> None:
    origin = {"Origin": "https://chat.example"}
    ask = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    allowed = "Access-Control-Allow-Origin"
    async with serving(model) as (client, _):
        assert allowed not in (await client.get("/health", headers=origin)).headers
        assert (await client.options(COMPLETIONS, headers=ask)).status_code == 405
    limits = {"allowed_origins": ["https://chat.example"], "api_key": ["a"]}
    async with serving(model, limits=limits) as (client, _):
        answer = await client.options(COMPLETIONS, headers=ask)
        assert (answer.status_code, answer.headers[allowed]) == (200, "https://chat.example")
        answer = await client.post(COMPLETIONS, json=HI, headers={**origin, **bearer("a")})
        assert (answer.status_code, answer.headers[allowed]) == (200, "https://chat.example")
        answer = await client.post(COMPLETIONS, json=HI, headers=origin)
        assert (answer.status_code, answer.headers[allowed]) == (401, "https://chat.example")
        answer = await client.get("/health", headers={"Origin": "https://other.example"})
        assert allowed not in answer.headers


async def test_logs_hold_no_prompt_and_no_key(
    model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(model, limits={"api_key": ["secret"]}) as (client, _):
        for fields in (HI, {"unknown": 1}, {"temperature": -1}, {"n": 500}, {"logprobs": "x"}):
            body: dict[str, Any] = {**HI, "prompt": "marigold", **fields}
            body["prompt"] = "marigold"
            await client.post(COMPLETIONS, json=body, headers=bearer("secret"))
            await client.post(COMPLETIONS, json=body, headers=bearer("wrong-secret"))
        await client.post(COMPLETIONS, content=b'{"prompt": "marigold', headers=bearer("secret"))
    assert "ignored unknown fields" in caplog.text  # logs were looked at
    assert "marigold" not in caplog.text
    assert "secret" not in caplog.text


# --- TLS --------------------------------------------------------------------------------------


def test_tls_needs_files_that_exist() -> None:  # test_serve_command.py has some that do
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pem"):
        app._http_options("127.0.0.1", 8000, app.Tls("nowhere.pem", __file__))
    for arguments in (["--ssl-certfile", "c"], ["--ssl-keyfile", "k"], ["--ssl-ca-certs", "c"]):
        ran = CliRunner().invoke(cli.app, ["serve", "model", *arguments])
        assert ran.exit_code == 2
        assert "--ssl-certfile" in ran.output


@pytest.mark.ray
def test_a_serve_without_tls_is_noticed(serve_port: int) -> None:
    with pytest.raises(RuntimeError, match="without TLS"):
        app._check_tls("127.0.0.1", serve_port)
