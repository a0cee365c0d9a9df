"""HTML pages in headless Chromium, driven by its DevTools protocol over a pipe: no driver, no package.

    with chromium() as browser:                     # skips the test, with the reason, where Chromium is not installed
        page = browser.open("report.html", dark=True)
        assert page.problems() == []                # requests that leave the page, errors on the console
        assert page.violations() == []              # axe-core: WCAG 2.2 AA and best practice, contrast and keyboard among them
        assert "2.35" in page.text("main")
        page.screenshot("dark.png")

Chromium: `apt-get install chromium`; MINILORA_CHROMIUM names another binary. axe-core comes from a package that bundles it (assets.py).
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import assets
import pytest

BINARY = os.environ.get("MINILORA_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
TIMEOUT = 60  # seconds for one command
AXE = ("axe-playwright-python", "0.1.8")  # bundles axe-core 4.12
_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]
_FLAGS = (
    *"--headless=new --remote-debugging-pipe --no-sandbox --disable-gpu --disable-dev-shm-usage --hide-scrollbars --no-first-run".split(),
    *"--disable-background-networking --disable-component-update --disable-sync".split(),
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1",
)


@contextmanager
def chromium() -> Iterator[Browser]:
    """A running browser. Skips the test where Chromium is not installed."""
    if not BINARY:
        pytest.skip("Chromium is not installed (apt-get install chromium)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(profile)
        try:
            yield browser
        finally:
            browser.close()


class Browser:
    """One Chromium process. Commands are written to its descriptor 3 and answered on 4, as JSON that ends with a zero byte."""

    def __init__(self, profile: str) -> None:
        their_read, self._write = os.pipe()
        self._read, their_write = os.pipe()

        def place() -> None:
            os.dup2(their_read, 50)  # first out of the way: they may be 3 and 4 the other way round
            os.dup2(their_write, 51)
            os.dup2(50, 3)
            os.dup2(51, 4)

        command = [str(BINARY), *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=place, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(their_read)
        os.close(their_write)
        self._count, self._rest = 0, b""
        self.events: list[dict[str, Any]] = []

    def close(self) -> None:
        try:
            self.send("Browser.close")
            self.process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        """The result of a command of the DevTools protocol. Raises RuntimeError for an error, OSError when the browser does not answer."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive(TIMEOUT)).get("id") != self._count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait(self, method: str, session: str) -> None:
        """Return when the event has come."""
        seen = 0
        while not any(e.get("method") == method and e.get("sessionId") == session for e in self.events[seen:]):
            seen = len(self.events)
            self.events.append(self._receive(TIMEOUT))

    def _receive(self, seconds: float) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], max(0, end - time.monotonic()))[0]:
                raise OSError(f"Chromium did not answer within {seconds} seconds")
            if not (piece := os.read(self._read, 2**20)):
                raise OSError(f"Chromium ended with status {self.process.wait()}")
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def open(self, page: str | Path, *, dark: bool = False, width: int = 1200, height: int = 900, inside: str = "") -> Page:
        """Load a file or a URL in a new tab, and wait until it is complete.

        dark: the colour scheme that the reader prefers. inside: the prefix of URLs that the page may load from; default: none
        """
        url = str(page) if "://" in str(page) else Path(page).resolve().as_uri()
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.send(f"{domain}.enable", session)
        self.send("Page.setBypassCSP", session, enabled=True)  # for axe-core
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", session, features=[scheme])
        self.send("Emulation.setDeviceMetricsOverride", session, width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events = [e for e in self.events if e.get("sessionId") != session]
        self.send("Page.navigate", session, url=url)
        self.wait("Page.loadEventFired", session)
        return Page(self, session, url, inside)


class Page:
    """A page in a tab."""

    def __init__(self, browser: Browser, session: str, url: str, inside: str) -> None:
        self.browser, self.session, self.url, self.inside = browser, session, url, inside

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression; of a promise, what it resolves to. Raises RuntimeError when it throws."""
        options = {"awaitPromise": True, "returnByValue": True}
        answer = self.browser.send("Runtime.evaluate", self.session, expression=expression, **options)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details["text"])
        return answer["result"].get("value")

    def text(self, selector: str = "body") -> str:
        """The text of the first element that matches, as a reader sees it."""
        return self.js(f"document.querySelector({json.dumps(selector)}).innerText")

    def press(self, key: str) -> str:
        """Press a key, as "Tab" or "Enter". Returns the element that then has the focus, as "a#skip: Skip to the content"."""
        code = {"Tab": 9, "Enter": 13, "Escape": 27, " ": 32, "ArrowRight": 39, "ArrowLeft": 37, "ArrowDown": 40, "ArrowUp": 38}.get(key, 0)
        text = {"text": {"Enter": "\r"}.get(key, key)} if key in ("Enter", " ") or len(key) == 1 else {}
        for kind in ("keyDown", "keyUp"):
            name = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
            self.browser.send("Input.dispatchKeyEvent", self.session, type=kind, **name, **(text if kind == "keyDown" else {}))
        return self.js(
            "(e => `${e.tagName.toLowerCase()}${e.id && '#' + e.id}: ${(e.ariaLabel || e.innerText || '').trim().slice(0, 80)}`)"
            "(document.activeElement)"
        )

    def problems(self) -> list[str]:
        """Requests for anything but the page itself (and what is `inside`), errors and warnings on the console, exceptions."""
        self.js("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        found = []
        for event in self.browser.events:
            params, method = event.get("params", {}), event.get("method")
            if event.get("sessionId") != self.session:
                continue
            if method == "Network.requestWillBeSent":
                url = params["request"]["url"]
                own = url.partition("#")[0] == self.url.partition("#")[0] or url.startswith(("data:", "blob:"))
                if not own and not (self.inside and url.startswith(self.inside)):
                    found.append(f"request for {url:.200}")
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['level']}: {params['entry']['text']:.300}")
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                said = (str(arg.get("value", arg.get("description"))) for arg in params["args"])
                found.append(f"console.{params['type']}: {' '.join(said):.300}")
            elif method == "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                found.append(f"exception: {details.get('exception', {}).get('description', details['text']):.300}")
        return found

    def violations(self) -> list[str]:
        """What axe-core finds, as "rule: elements: what is wrong". Skips the test where axe-core cannot be downloaded."""
        try:
            file = next(assets.package(*AXE).rglob("axe.min.js"))
        except assets.NotHere as reason:
            pytest.skip(str(reason))
        if not self.js("typeof axe == 'object'"):
            self.js(f"{file.read_text(encoding='utf-8')}; 0")
        options = {"runOnly": {"type": "tag", "values": _RULES}, "resultTypes": ["violations"]}
        found = self.js(f"axe.run(document, {json.dumps(options)}).then(r => r.violations)")
        return [
            f"{rule['id']}: {', '.join(str(node['target'][0]) for node in rule['nodes'][:5])} ({len(rule['nodes'])}): {rule['help']}"
            + "".join(f"\n    {node['html']:.120}: {node.get('failureSummary', '')}" for node in rule["nodes"][:3])
            for rule in found
        ]

    def screenshot(self, path: str | Path, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of what is visible."""
        options: dict[str, Any] = {}
        if whole:
            size = self.browser.send("Page.getLayoutMetrics", self.session)["cssContentSize"]
            options = {"captureBeyondViewport": True, "clip": {**size, "x": 0, "y": 0, "scale": 1}}
        data = self.browser.send("Page.captureScreenshot", self.session, format="png", **options)["data"]
        Path(path).write_bytes(base64.b64decode(data))
