"""A real browser for tests that look at a page: Debian's Chromium, headless, driven by Playwright.

`browser`, `open_page`, `page` and `pictures` are fixtures of every test (`tests/conftest.py` has
them). Where there is no Chromium or no Playwright, the tests that ask for them are skipped.

Playwright was chosen over Selenium because it waits for what a test expects instead of being told
how long to wait, and because each page can have a size, a colour scheme and a profile of its own.
It drives the system's Chromium, of whatever version; it is never to download one.

The tests of such a module are plain functions: Playwright's synchronous interface has an event loop
of its own running in this thread, until the module's last test has ended.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROGRAMS: Final = ("chromium", "chromium-browser", "google-chrome")
DESKTOP: Final = (1280, 800)
PHONE: Final = (390, 844)
# Where a person finds the pictures that tests take; without it they go with the test's own files.
PICTURES_VARIABLE: Final = "ASUPERVISE_PICTURES"
# Most waits are over in milliseconds. On a machine with much else to do it may be seconds.
CEILING_MS: Final = 20_000

OpenPage = Callable[..., "Page"]


def chromium() -> str:
    """The browser's path; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(PROGRAMS)} is installed")
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for the tests of a module, which starts in less than a second.

    It is none of any test's processes: it was there before the first, and its own children, which
    come and go with pages, do not have the mark by which `conftest` knows a test's processes.
    """
    api = pytest.importorskip("playwright.sync_api", reason="no browser: Playwright is missing")
    from tests.conftest import TOKEN_NAME

    program = chromium()
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_NAME}
    api.expect.set_options(timeout=CEILING_MS)
    with api.sync_playwright() as playwright:
        # Root cannot have Chromium's sandbox. What is shown comes from the test.
        started = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox"], env=environment
        )
        with started:
            yield started


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Opens pages: ``open_page(size=DESKTOP, dark=False, **options)``, each as of a new visitor.

    Further options are those of Playwright's ``Browser.new_context``: ``offline=True``,
    ``java_script_enabled=False``. An exception in a page's script, and an error on its console
    (such as what its Content-Security-Policy has refused, or an answer of 404), fails the test at
    its end, unless ``tolerates="part of the error"`` says that it belongs to the test.
    """
    errors: list[str] = []
    with ExitStack() as stack:
        yield functools.partial(_open, browser, stack, errors)
    assert not errors, "\n".join(errors)


def _open(
    browser: Browser,
    stack: ExitStack,
    errors: list[str],
    size: tuple[int, int] = DESKTOP,
    dark: bool = False,
    tolerates: str | None = None,
    **options: Any,
) -> Page:
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        **options,
    )
    stack.enter_context(context)
    context.set_default_timeout(CEILING_MS)
    opened = context.new_page()

    def complain(text: str) -> None:
        if tolerates is None or tolerates not in text:
            errors.append(f"{opened.url}: {text}")

    opened.on("pageerror", lambda error: complain(f"exception: {error}"))
    opened.on("console", lambda said: complain(said.text) if said.type == "error" else None)
    return opened


@pytest.fixture
def page(open_page: OpenPage) -> Page:
    """A page of desktop size in light colours."""
    return open_page()


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """The folder for pictures: ``$ASUPERVISE_PICTURES``, or the test's own."""
    named = os.environ.get(PICTURES_VARIABLE)
    folder = Path(named) if named else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def take_pictures(page: Page, folder: Path, name: str, *, full_page: bool = False) -> None:
    """Four pictures of a page: ``<name>-{desktop,phone}-{light,dark}.png``.

    The page keeps what it shows, and has desktop size and light colours afterwards. None may be
    wider than its window: a page that must be pushed sideways on a phone fails the test.
    """
    for size_name, size in (("phone", PHONE), ("desktop", DESKTOP)):
        page.set_viewport_size({"width": size[0], "height": size[1]})
        for scheme in ("dark", "light"):
            page.emulate_media(color_scheme=scheme)
            path = folder / f"{name}-{size_name}-{scheme}.png"
            page.screenshot(path=path, full_page=full_page, animations="disabled")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= size[0], f"{name}: {width} px wide in a window of {size[0]} px"
