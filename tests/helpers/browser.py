"""A headless Chromium, driven over its DevTools protocol: no driver to install, only a browser.

https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import aiohttp

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_KEYS = {"Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39, "Tab": 9}


def find_browser() -> str | None:
    """A Chromium's path: CHROMIUM in the environment, or one on the PATH."""
    named = os.environ.get("CHROMIUM")
    return named or next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
    """One tab. `errors` are what its console and scripts complained of."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._next = 0
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.errors: list[str] = []
        self.requests: list[str] = []  # addresses of everything it fetched

    async def read(self) -> None:
        """Take in what the browser says, until it goes."""
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                self._waiting.pop(told["id"]).set_result(told)
                continue
            params = told["params"]
            if told["method"] == "Runtime.exceptionThrown":
                self.errors.append(json.dumps(params["exceptionDetails"]))
            elif told["method"] == "Log.entryAdded" and params["entry"]["level"] == "error":
                self.errors.append(params["entry"]["text"])
            elif told["method"] == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])

    async def send(self, method: str, **params: Any) -> Any:
        self._next += 1
        number = self._next
        self._waiting[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        told = await asyncio.wait_for(self._waiting[number], 120)
        assert "error" not in told, told["error"]
        return told["result"]

    async def open(self, url: str) -> None:
        await self.send("Page.navigate", url=url)
        await self.until("document.readyState == 'complete'")

    async def eval(self, script: str) -> Any:
        """A JavaScript expression's value."""
        told = await self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in told, (script, told["exceptionDetails"])
        return told["result"].get("value")

    async def until(self, script: str, seconds: float = 120) -> Any:
        """Wait until an expression is true; its value."""
        deadline = asyncio.get_running_loop().time() + seconds
        while not (value := await self.eval(script)):
            assert asyncio.get_running_loop().time() < deadline, f"never true: {script}"
            await asyncio.sleep(0.03)
        return value

    async def text(self, selector: str) -> str:
        return str(await self.eval(f"document.querySelector({json.dumps(selector)}).innerText"))

    async def type(self, text: str) -> None:
        """Into what has the focus."""
        await self.send("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        more = {"text": "\r"} if key == "Enter" else {}
        code = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        await self.send("Input.dispatchKeyEvent", type="keyDown", **code, **more)
        await self.send("Input.dispatchKeyEvent", type="keyUp", **code)

    async def _middle(self, selector: str) -> dict[str, float]:
        found = await self.eval(
            f"(() => {{ const box = document.querySelector({json.dumps(selector)})"
            ".getClientRects()[0];"
            "return {x: box.x + box.width / 2, y: box.y + box.height / 2} })()"
        )
        return dict(found)

    async def hover(self, selector: str, until: str) -> None:
        """Move the mouse over an element, and after it if it moves, until an expression is true."""
        deadline = asyncio.get_running_loop().time() + 120
        while True:
            at = await self._middle(selector)
            await self.send("Input.dispatchMouseEvent", type="mouseMoved", **at)
            if await self.eval(until):
                return
            assert asyncio.get_running_loop().time() < deadline, f"never true: {until}"
            await asyncio.sleep(0.1)

    async def click(self, selector: str) -> None:
        """With the mouse, so that what covers an element is found out."""
        at = await self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            await self.send(
                "Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **at
            )

    async def screenshot(self, path: Path) -> None:
        told = await self.send("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(told["data"]))

    async def resize(self, width: int, height: int) -> None:
        await self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    async def prefer(self, scheme: str) -> None:
        """The system's colours: light or dark."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.send("Emulation.setEmulatedMedia", features=features)


@contextmanager
def browser(path: str, profile: Path) -> Iterator[int]:
    """A running browser; the port of its protocol."""
    command = [
        path,
        "--headless=new",
        "--remote-debugging-port=0",
        f"--user-data-dir={profile}",
        "--no-first-run",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--disable-background-networking",
        "about:blank",
    ]
    if os.geteuid() == 0:
        command.insert(1, "--no-sandbox")  # Chromium's own does not work for root
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        told = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 120
        while not (told.exists() and told.read_text().count("\n")):
            assert process.poll() is None, "the browser ended at once"
            assert time.monotonic() < deadline, "the browser did not start"
            time.sleep(0.05)
        yield int(told.read_text().splitlines()[0])
    finally:
        process.terminate()
        process.wait(120)


@asynccontextmanager
async def new_page(port: int) -> AsyncIterator[Page]:
    """A page with storage of its own."""
    async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
        async with session.get("/json/version") as answer:
            address = (await answer.json(content_type=None))["webSocketDebuggerUrl"]
        async with session.ws_connect(address, max_msg_size=0) as socket:
            whole = Page(socket)
            reading = asyncio.ensure_future(whole.read())
            context = (await whole.send("Target.createBrowserContext"))["browserContextId"]
            target = await whole.send(
                "Target.createTarget", url="about:blank", browserContextId=context
            )
            async with session.ws_connect(
                f"/devtools/page/{target['targetId']}", max_msg_size=0
            ) as inner:
                page = Page(inner)
                listening = asyncio.ensure_future(page.read())
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await page.send(f"{domain}.enable")
                yield page
                listening.cancel()
            await whole.send("Target.disposeBrowserContext", browserContextId=context)
            reading.cancel()
