"""A page in headless Chromium, over the DevTools protocol on two pipes: no library, no port, no network."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WHERE = next((path for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (path := shutil.which(
    name))), None)
MISSING = "" if WHERE and os.name == "posix" else "Chromium is not installed (apt-get install chromium)" if not (
    WHERE) else "the pipes to Chromium are POSIX's"
LIMIT = 120  # seconds for an answer

# What a page shows: its width, texts that lie over each other, texts that leave their picture.
LAYOUT = """(() => {
  const boxes = [], outside = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    if (!node.data.trim() || node.parentElement.closest("style")) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const svg = node.parentElement.closest("svg"), frame = svg && svg.getBoundingClientRect();
    for (const r of range.getClientRects()) {
      if (!r.width || !r.height) continue;
      boxes.push([r.left, r.top, r.right, r.bottom, node.data.trim().slice(0, 60)]);
      if (frame && (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1
                    || r.bottom > frame.bottom + 1)) outside.push(node.data);
    }
  }
  boxes.sort((a, b) => a[1] - b[1]);
  const overlaps = [];
  for (let i = 0; i < boxes.length; i++)
    for (let j = i + 1; j < boxes.length && boxes[j][1] < boxes[i][3]; j++) {
      const [a, b] = [boxes[i], boxes[j]];
      const wide = Math.min(a[2], b[2]) - Math.max(a[0], b[0]), high = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
      if (wide > 1 && high > 0.25 * Math.min(a[3] - a[1], b[3] - b[1])) overlaps.push(`${a[4]} | ${b[4]}`);
    }
  const root = document.documentElement;
  return {width: innerWidth, scroll: root.scrollWidth, height: root.scrollHeight, texts: boxes.length, overlaps,
          outside};
})()"""


class Tab:
    """One page. `errors`: what its console has said."""

    def __init__(self, read: int, write: int):
        self.read, self.write, self.buffer, self.n = read, write, b"", 0
        self.session: dict[str, str] = {}
        self.errors: list[str] = []
        self.loaded = False

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command."""
        self.n += 1
        os.write(self.write, json.dumps({"id": self.n, "method": method, "params": parameters, **self.session}).encode()
                 + b"\0")
        while True:
            message = self.receive()
            if message.get("id") == self.n:
                assert "error" not in message, message
                return message["result"]

    def receive(self) -> dict[str, Any]:
        end = time.monotonic() + LIMIT
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            more = os.read(self.read, 1 << 20)
            assert more, "Chromium has ended"
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        method = message.get("method", "")
        if method in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded"):
            self.errors.append(json.dumps(message["params"])[:500])
        self.loaded = self.loaded or method == "Page.loadEventFired"
        return message

    def open(self, path: Path) -> None:
        self.loaded = False
        self.send("Page.navigate", url=path.resolve().as_uri())
        while not self.loaded:
            self.receive()

    def layout(self, width: int, dark: bool = False) -> dict[str, Any]:
        """What LAYOUT finds in a window of so many pixels."""
        self.send("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        return self.send("Runtime.evaluate", expression=LAYOUT, returnByValue=True)["result"]["value"]

    def screenshot(self, path: Path, width: int, height: int, top: int = 0) -> None:
        """For a person who wants to look: so many pixels of the page, from `top` on."""
        found = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip={
            "x": 0, "y": top, "width": width, "height": height, "scale": 1})
        path.write_bytes(base64.b64decode(found["data"]))


@contextmanager
def tab(folder: Path) -> Iterator[Tab]:
    """A page of a Chromium of its own, whose profile is in the folder."""
    to_read, to_write = os.pipe(), os.pipe()

    def pipes() -> None:  # Chromium reads commands from 3 and answers on 4
        low, high = os.dup(to_read[0]), os.dup(to_write[1])
        os.dup2(low, 3)
        os.dup2(high, 4)

    process = subprocess.Popen(
        [str(WHERE), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
         "--disable-background-networking", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"],
        preexec_fn=pipes, pass_fds=(3, 4), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(to_read[0])
    os.close(to_write[1])
    page = Tab(to_write[0], to_read[1])
    try:
        target = page.send("Target.createTarget", url="about:blank")["targetId"]
        session = page.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page.session = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log"):
            page.send(f"{domain}.enable")
        yield page
    finally:
        process.kill()
        process.wait()
        os.close(to_write[0])
        os.close(to_read[1])
