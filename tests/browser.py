"""A real headless Chromium, driven by Selenium: opens a page, notes requests and errors, takes
screenshots.

python -m tests.browser http://127.0.0.1:8000 shot.png 390
"""

import base64
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from selenium import webdriver

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no Chromium with its driver here (Debian: apt-get install chromium chromium-driver)",
)


class Browser:
    """One tab as a screen of a width shows it; a mobile one below 600 pixels."""

    def __init__(self, width: int):
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        os.environ["SE_OFFLINE"] = "true"
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
        shape = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", shape)
        self.requests: dict[str, str] = {}

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        self.driver.quit()

    def open(self, page: Path | str) -> None:
        """Load a file or an address, to its end."""
        self.driver.get(page.resolve().as_uri() if isinstance(page, Path) else page)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression."""
        return self.driver.execute_script(f"return {expression}")

    def asked(self) -> list[str]:
        """The addresses that the tab has asked for so far; those that the page's policy kept from
        being asked left out."""
        for line in self.driver.get_log("performance"):
            message = json.loads(line["message"])["message"]
            of = message["params"].get("requestId")
            if message["method"] == "Network.requestWillBeSent":
                self.requests[of] = message["params"]["request"]["url"]
            elif message["params"].get("blockedReason") == "csp":
                self.requests.pop(of, None)
        return list(self.requests.values())

    def errors(self) -> list[str]:
        """What the tab has complained of since it was asked last."""
        return [line["message"] for line in self.driver.get_log("browser")]

    def screenshot(self, path: Path) -> None:
        """The whole page, not only what the screen shows."""
        self._save(path, "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True})

    def pdf(self, path: Path) -> None:
        """The page as it is printed on A4."""
        self._save(path, "Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})

    def _save(self, path: Path, command: str, parameters: dict) -> None:
        path.write_bytes(base64.b64decode(self.driver.execute_cdp_cmd(command, parameters)["data"]))


if __name__ == "__main__":
    with Browser(int(sys.argv[3])) as browser:
        browser.open(sys.argv[1] if "://" in sys.argv[1] else Path(sys.argv[1]))
        browser.screenshot(Path(sys.argv[2]))
