"""The Space as a visitor sees it: starts it, opens it in headless Chromium, and takes its picture.

python hub_cards/space/screenshot.py
"""

import argparse
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).parent
DESKTOP = (1280, 900)
# Chromium as root, without a GPU, and quiet: its own services would reach for the network.
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_chromium() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((path for path in map(shutil.which, names) if path), None)


@contextmanager
def serve(app: Path) -> Iterator[str]:
    """Runs an app.py in a process of its own and yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, app.name], cwd=app.parent, env=environment)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise RuntimeError(f"{app} stopped with status {process.returncode}")
            try:
                urlopen(address).close()
                break
            except URLError:
                time.sleep(0.5)
        else:
            raise RuntimeError(f"{app} did not answer within two minutes")
        yield address
    finally:
        process.terminate()
        process.wait()


@contextmanager
def browse(size: tuple[int, int] = DESKTOP) -> Iterator[Page]:
    """An empty page of a fresh browser, `size` (width, height) large."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=find_chromium(), args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme="light")
            page.set_default_timeout(120_000)
            yield page
        finally:
            browser.close()


def visit(page: Page, address: str) -> None:
    """Opens the app and waits for its first answer."""
    page.goto(address)
    page.wait_for_selector(".lp table")


def take(address: str, path: Path) -> None:
    with browse() as page:
        visit(page, address)
        # What fades in has done so.
        page.wait_for_timeout(1000)
        page.screenshot(path=path, full_page=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE / "screenshot.png")
    output = parser.parse_args(argv).output
    if find_chromium() is None:
        print("screenshot: no Chromium on this machine: apt-get install chromium", file=sys.stderr)
        return 2
    with serve(HERE / "app.py") as address:
        take(address, output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
