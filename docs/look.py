"""Look at the built site as readers do: in a browser, on a desk and on a phone, light and dark.

    python docs/look.py [--site docs/_build/html] [--out docs/_build/pictures]

Checks every page's links and images as files, then opens some pages of each kind in headless
Chromium, which must be installed with its driver, and saves a picture of each. Prints what is wrong
and exits with 1 if anything is: a link that leads nowhere, an error in the browser's console, an
image that did not load, or a page that is wider than the screen.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import shutil
import sys
import threading
from collections.abc import Iterator
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

PAGES = (
    "index.html",
    "start.html",
    "guides/covariances.html",
    "explanations/mathematics.html",
    "gallery/index.html",
    "gallery/which_probes.html",
    "results/index.html",
    "comparison.html",
    "api/ocm.html",
    "api/generated/hessdiag.estimate.html",
)
WIDTHS = {"desk": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")


class _Page(HTMLParser):
    """What a page links to, and the places in it that links may end at."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name in ("id", "name"):
                self.places.add(value)
            elif name == ("href" if tag in ("a", "link") else "src"):
                self.links.append(value)


def broken_links(site: Path) -> list[str]:
    """Return 'PAGE: LINK' for every link within the site to no file, or to no place of it."""
    pages = {
        file: _Page(file.read_text(encoding="utf-8"))
        for file in site.rglob("*.html")
        if "_static" not in file.parts
    }
    found = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir():
                target = target / "index.html"
            place = unquote(parts.fragment)
            known = pages.get(target)
            if not target.exists() or (place and known and place not in known.places):
                found.append(f"{file.relative_to(site)}: {link}")
    return sorted(set(found))


@contextlib.contextmanager
def _served(site: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


@contextlib.contextmanager
def _browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                     "--disable-background-networking", "--disable-sync"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield browser
    finally:
        browser.quit()


def _look(browser: webdriver.Chrome, address: str, page: str, out: Path) -> Iterator[str]:
    """Open a page in every way, save its pictures, and yield what is wrong with it."""
    for screen, (width, height) in WIDTHS.items():
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": screen == "phone"},
        )
        for scheme in SCHEMES:
            feature = {"name": "prefers-color-scheme", "value": scheme}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            browser.get(f"{address}/{page}")
            browser.execute_async_script(
                "document.fonts.ready.then(() => setTimeout(arguments[0], 300))"
            )
            name = page.removesuffix(".html").replace("/", "_")
            browser.save_screenshot(str(out / f"{name}_{screen}_{scheme}.png"))
            where = f"{page} on a {screen}, {scheme}"
            for entry in browser.get_log("browser"):
                if entry["level"] in ("WARNING", "SEVERE"):
                    yield f"{where}: {entry['message']}"
            wide = browser.execute_script("return document.documentElement.scrollWidth")
            if wide > width:
                yield f"{where}: {wide} pixels wide on a screen of {width}"
            unloaded = browser.execute_script(
                "return [...document.images].filter(i => i.loading != 'lazy' && !i.naturalWidth)"
                ".map(i => i.src)"
            )
            yield from (f"{where}: {image} did not load" for image in unloaded)
            theme = browser.execute_script("return document.documentElement.dataset.theme")
            if theme != scheme:
                yield f"{where}: it is shown as {theme}"


def main() -> int:
    """Check the site, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    parser.add_argument("--site", type=Path, default=here / "_build" / "html")
    parser.add_argument("--out", type=Path, default=here / "_build" / "pictures")
    options = parser.parse_args()
    if not (options.site / "index.html").exists():
        print(
            f"--site is {options.site}, which holds no built site: run make docs", file=sys.stderr
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    wrong = [f"broken link: {link}" for link in broken_links(options.site.resolve())]
    with _served(options.site) as address, _browser() as browser:
        for page in PAGES:
            wrong += _look(browser, address, page, options.out)
    print("\n".join(wrong))
    print(f"{len(PAGES)} pages in {options.out}; {len(wrong)} things wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
