"""Headless Chromium through its debugging pipe (the DevTools protocol): no driver, no package, no port.

Everything waits with a bound. `messages` keeps what a page logged, raised or asked of the network.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

PROGRAMS = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
_SECONDS = 60.0
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe")
_KEYS = {
    "ArrowRight": 39,
    "ArrowLeft": 37,
    "ArrowDown": 40,
    "ArrowUp": 38,
    "Home": 36,
    "End": 35,
}


def program() -> str | None:
    """Of a Chromium on this machine, if there is one."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Browser:
    """One page. Use as a context manager.

    Attributes:
        messages: console messages, exceptions and security reports, as text.
        requests: URLs of everything that was asked for but the page itself.
    """

    def __init__(self, profile: Path) -> None:
        found = program()
        assert found is not None
        self.messages: list[str] = []
        self.requests: list[str] = []
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self._page = ""
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # Chromium reads file descriptor 3 and writes 4.
        script = f'exec "$0" "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, found, *_FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)

    def __enter__(self) -> "Browser":
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, **arguments: Any) -> dict[str, Any]:
        """A command and its result."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": arguments}
        if self._session is not None and not method.startswith("Target."):
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number = self._count
        while (answer := self._next()).get("id") != number:
            self._note(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, *, width: int, height: int, is_dark: bool = False) -> None:
        """Loads a file in a window of this size."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}]
        self.send("Emulation.setEmulatedMedia", features=scheme)
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self._page = path.absolute().as_uri()
        self.send("Page.navigate", url=self._page)
        self.wait_for("document.readyState === 'complete' && location.protocol === 'file:'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Until an expression is true."""
        deadline = time.monotonic() + _SECONDS
        while not self.run(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """One key, down and up."""
        shared = {"key": key, "code": key, "windowsVirtualKeyCode": _KEYS[key]}
        self.send("Input.dispatchKeyEvent", type="rawKeyDown", **shared)
        self.send("Input.dispatchKeyEvent", type="keyUp", **shared)

    def point_at(self, selector: str, *, click: bool = False) -> None:
        """Moves the mouse into the middle of an element's first line, and clicks it if asked to."""
        script = f"(() => {{ const e = document.querySelector({json.dumps(selector)});"
        script += " e.scrollIntoView({block: 'center', behavior: 'instant'});"
        script += " const r = e.getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        x, y = self.run(script)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        if click:
            for kind in ("mousePressed", "mouseReleased"):
                self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def picture(self, path: Path, selector: str | None = None) -> None:
        """A PNG of the whole page, or of one element."""
        script = "[0, 0, document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        if selector is not None:
            script = f"(() => {{ const r = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            script += " return [r.x + scrollX, r.y + scrollY, r.width, r.height]; })()"
        x, y, width, height = self.run(script)
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        data = self.send("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        deadline = time.monotonic() + _SECONDS
        while b"\0" not in self._buffer:
            left = deadline - time.monotonic()
            assert left > 0 and self._process.poll() is None, "Chromium does not answer"
            if select.select([self._read], [], [], min(left, 1.0))[0]:
                self._buffer += os.read(self._read, 1 << 20)
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        found = event.get("params", {})
        match event.get("method"):
            case "Runtime.consoleAPICalled":
                self.messages.append(f"console.{found['type']}: {found['args']}")
            case "Runtime.exceptionThrown":
                self.messages.append(f"exception: {found['exceptionDetails']}")
            case "Log.entryAdded":
                self.messages.append(f"log: {found['entry']}")
            case "Network.requestWillBeSent":
                url = found["request"]["url"]
                if url.partition("#")[0] != self._page and not url.startswith("data:"):
                    self.requests.append(url)
