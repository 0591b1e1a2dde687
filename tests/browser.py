"""A headless Chromium, driven by the WebDriver protocol (w3.org/TR/webdriver2) over plain HTTP.

Debian: `apt-get install chromium chromium-driver`. `start()` raises Missing where there is none.

Not covered: anything that a test here does not need.
"""
import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--disable-dev-shm-usage", "--force-device-scale-factor=1"]
KEYS = {"left": "\ue012", "up": "\ue013", "right": "\ue014", "down": "\ue015", "home": "\ue011",
        "end": "\ue010", "tab": "\ue004", "escape": "\ue00c", "space": " "}


class Missing(Exception):
    """There is no Chromium or no driver here."""


def find():
    """Paths of (chromium, chromedriver). Raises Missing."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    chromium = next(filter(None, map(shutil.which, names)), None)
    driver = shutil.which("chromedriver")
    if chromium is None or driver is None:
        raise Missing("no Chromium with chromedriver: apt-get install chromium chromium-driver")
    return chromium, driver


def send(url, body=None, method=None):
    """One JSON request; the `value` of what comes back."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"},
                                     method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(error.read().decode()) from error


class Browser:
    """One window. Use it in a `with`: the end closes it and removes its profile."""

    def __init__(self):
        chromium, driver = find()
        self.profile = tempfile.mkdtemp()
        self.log = open(os.path.join(self.profile, "driver.log"), "w+")
        self.process = subprocess.Popen([driver, "--port=0"], stdout=self.log, stderr=self.log)
        try:
            self.session = None
            address = f"http://127.0.0.1:{self.port()}/session"
            options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={self.profile}/data"]}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            answer = send(address, {"capabilities": {"alwaysMatch": wanted}})
            self.session = f"{address}/{answer['sessionId']}"
        except BaseException:
            self.close()
            raise

    def port(self):
        """The port that the driver says it chose."""
        for _ in range(300):
            with open(self.log.name) as log:
                words = log.read().replace(".", " ").split()
            if "successfully" in words and "port" in words:
                return int(words[words.index("port", words.index("successfully")) + 1])
            time.sleep(0.1)
        raise RuntimeError("chromedriver did not start in 30 s")

    def close(self):
        if self.session is not None:
            send(self.session, method="DELETE")
        self.process.terminate()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.profile, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def open(self, path):
        send(f"{self.session}/url", {"url": path.as_uri()})

    def run(self, script, *args):
        """What a piece of JavaScript returns."""
        return send(f"{self.session}/execute/sync", {"script": script, "args": list(args)})

    def chrome(self, command, **params):
        """A command of Chrome's own protocol, such as Emulation.setEmulatedMedia."""
        return send(f"{self.session}/goog/cdp/execute", {"cmd": command, "params": params})

    def size(self, width, height):
        self.chrome("Emulation.setDeviceMetricsOverride", width=width, height=height,
                    deviceScaleFactor=1, mobile=False)

    def press(self, *names):
        """Real key strokes, to whatever has the focus."""
        actions = []
        for name in names:
            value = KEYS.get(name, name)
            actions += [{"type": "keyDown", "value": value}, {"type": "keyUp", "value": value}]
        source = {"type": "key", "id": "keys", "actions": actions}
        send(f"{self.session}/actions", {"actions": [source]})
        self.flush()

    def flush(self):
        """Wait until the page has drawn what the last input changed."""
        frames = "requestAnimationFrame(() => requestAnimationFrame(arguments[0]))"
        script = {"script": frames.replace("arguments[0]", "() => done()"), "args": []}
        script["script"] = "const done = arguments[0]; " + script["script"]
        send(f"{self.session}/execute/async", script)

    def pointer(self, selector, *then, at=(0, 0)):
        """Move the mouse to `at`, in pixels from an element's middle; then "down", "up", (x, y)."""
        found = send(f"{self.session}/element", {"using": "css selector", "value": selector})
        actions = [{"type": "pointerMove", "origin": found, "x": at[0], "y": at[1]}]
        for action in then:
            if action in ("down", "up"):
                actions.append({"type": f"pointer{action.title()}", "button": 0})
            else:
                x, y = action
                actions.append({"type": "pointerMove", "origin": "pointer", "x": x, "y": y,
                                "duration": 100})
        source = {"type": "pointer", "id": "mouse", "actions": actions}
        send(f"{self.session}/actions", {"actions": [source]})

    def click(self, selector, at=(0, 0)):
        self.pointer(selector, "down", "up", at=at)

    def wait(self, script, *args, seconds=20):
        """Wait until a piece of JavaScript returns something true; that."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            value = self.run(script, *args)
            if value:
                return value
            time.sleep(0.02)
        raise TimeoutError(f"{script} stayed {value!r} for {seconds} s")

    def console(self):
        """Messages of the console: errors, refused requests."""
        found = send(f"{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in found]

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(send(f"{self.session}/screenshot")))
