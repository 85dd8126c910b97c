"""`tensorray serve` on a cluster that serves something already."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus

from tensorray.cluster import app
from tensorray.cluster.config import EngineConfig
from tensorray.cluster.usage_error import UsageError

MINE = EngineConfig(model="org/mine")


def serves(monkeypatch: pytest.MonkeyPatch, status: ApplicationStatus | None, name: str) -> None:
    """Have this process see a cluster on which a model is served under a name."""
    found = {} if status is None else {app.APP_NAME: SimpleNamespace(status=status)}
    answer = SimpleNamespace(result=lambda timeout_s: [name])
    handle = SimpleNamespace(models=SimpleNamespace(remote=lambda: answer))
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications=found))
    monkeypatch.setattr(serve, "get_app_handle", lambda _: handle)


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (None, ""),
        (ApplicationStatus.RUNNING, "org/mine"),
        (ApplicationStatus.DEPLOY_FAILED, "org/other"),
    ],
)
def test_a_model_takes_its_own_place_or_an_empty_one(
    monkeypatch: pytest.MonkeyPatch, status: ApplicationStatus | None, name: str
) -> None:
    serves(monkeypatch, status, name)
    app._check_free(MINE)


def test_another_model_is_not_put_out(monkeypatch: pytest.MonkeyPatch) -> None:
    serves(monkeypatch, ApplicationStatus.RUNNING, "org/other")
    touched: list[Any] = []
    monkeypatch.setattr(app, "joins", lambda: True)
    monkeypatch.setattr(app, "connect", lambda: False)
    monkeypatch.setattr(app, "stop", touched.append)
    monkeypatch.setattr(serve, "start", touched.append)
    with pytest.raises(UsageError, match="serves org/other already, which org/mine would"):
        app.run(MINE)
    assert touched == []


def test_proxies_that_take_long_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[HTTPOptions] = []

    def start(http_options: HTTPOptions) -> None:
        asked.append(http_options)
        if len(asked) == 1:
            raise TimeoutError("HTTP proxies not available after 60s.")

    monkeypatch.setattr(serve, "start", start)
    options = HTTPOptions(port=1234)
    app.start_serve(options)
    assert asked == [options, options]
