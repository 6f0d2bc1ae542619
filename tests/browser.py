"A real browser for tests: Chromium, driven over its debugging protocol."
import base64
import itertools
import json
import re
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from urllib.request import urlopen

from websockets.sync.client import connect

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


class Browser:
    "One page of a headless Chromium; what the page complains about is in `complaints`."

    def __init__(self, width: int = 1200, height: int = 900, language: str = "en") -> None:
        self.folder = tempfile.mkdtemp()
        self.process = subprocess.Popen([CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0", f"--lang={language}", f"--user-data-dir={self.folder}", "about:blank"],
                                        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        port = next(found[1] for line in self.process.stderr if (found := re.search(r"ws://[^:]+:(\d+)/", line)))
        [page] = [page for page in json.load(urlopen(f"http://127.0.0.1:{port}/json")) if page["type"] == "page"]
        self.stack, self.ids, self.complaints = ExitStack(), itertools.count(1), []
        self.socket = self.stack.enter_context(connect(page["webSocketDebuggerUrl"], max_size=None, ping_interval=None))
        for domain in ("Page", "Runtime", "DOM", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(width, height)

    def call(self, method: str, **given):
        "Call a method of the protocol and wait for its answer."
        number = next(self.ids)
        self.socket.send(json.dumps({"id": number, "method": method, "params": given}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, f"{method}: {message}"
                return message["result"]
            self.listen(message)

    def listen(self, message: dict) -> None:
        "Note what the page complains about, and what it asks elsewhere for."
        said = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown" or message.get("method") == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.complaints.append(json.dumps(said)[:500])
        if message.get("method") == "Network.requestWillBeSent" and not said["request"]["url"].startswith(("http://127.0.0.1", "http://localhost", "data:", "blob:", "chrome")):
            self.complaints.append(f"asks {said['request']['url']}")

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str):
        "Run a script in the page and give its value."
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, f"{script}: {answer['exceptionDetails']}"
        return answer["result"].get("value")

    def wait(self, script: str, seconds: float = 30) -> None:
        "Wait until a script gives something true."
        end = time.monotonic() + seconds
        while not self.run(script):
            assert time.monotonic() < end, f"waited {seconds} s for {script}; complaints: {self.complaints}"
            time.sleep(0.05)

    def choose(self, selector: str, file: Path) -> None:
        "Choose a file in a field."
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"])

    def drag(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        "Drag the mouse, in px of the window."
        for kind, (x, y) in (("mousePressed", start), ("mouseMoved", ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)), ("mouseMoved", end), ("mouseReleased", end)):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1, buttons=1)

    def shoot(self, path: Path, whole: bool = True) -> None:
        "Take a picture of the page."
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]))

    def close(self) -> None:
        self.stack.close()
        self.process.kill()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
