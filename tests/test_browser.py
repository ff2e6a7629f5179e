"""The browser that other tests use: it runs pages, and tells of their errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.browser import PHONE, OpenPage, take_pictures

pytestmark = pytest.mark.pages

if TYPE_CHECKING:
    from playwright.sync_api import Page

PAGE = """
<!doctype html><title>t</title><meta name="viewport" content="width=device-width">
<h1>shown</h1><script>document.querySelector("h1").textContent += " and run"</script>
"""


def test_a_page_is_shown_and_its_script_runs(page: Page) -> None:
    page.set_content(PAGE)
    assert page.inner_text("h1") == "shown and run"


def test_a_page_of_a_phone_in_the_dark_without_scripts(open_page: OpenPage) -> None:
    page = open_page(PHONE, dark=True, java_script_enabled=False)
    page.set_content(PAGE)
    assert page.inner_text("h1") == "shown"
    assert page.viewport_size == {"width": PHONE[0], "height": PHONE[1]}


def test_pictures_have_both_sizes_and_schemes(page: Page, tmp_path: Path) -> None:
    page.set_content(PAGE)
    take_pictures(page, tmp_path, "it")
    names = [
        f"it-{size}-{scheme}.png" for size in ("desktop", "phone") for scheme in ("dark", "light")
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_a_page_that_is_too_wide_for_a_phone_is_told(page: Page, tmp_path: Path) -> None:
    page.set_content(PAGE + "<div style='width: 600px'>wide</div>")
    with pytest.raises(AssertionError, match=r"wide: 60\d px wide"):
        take_pictures(page, tmp_path, "wide")
