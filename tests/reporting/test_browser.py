"""The page in a real browser: no complaint, tables that sort, readable on a telephone, light and dark; and live."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import chromium, complaints, resize

from fedspan import reporting
from fedspan.cli.report import diagnostics_in_words

pytest.importorskip("matplotlib")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    with chromium() as opened:
        yield opened


def background(window: Any) -> str:
    return str(window.execute_script("return getComputedStyle(document.body).backgroundColor"))


@pytest.mark.parametrize("width", [1280, 390])
def test_no_complaint_and_no_sideways_scroll(window: Any, page: Path, width: int) -> None:
    seen = set()
    for scheme in ("light", "dark"):
        resize(window, width, scheme)
        window.get(page.as_uri())
        window.execute_script("for (const part of document.querySelectorAll('details')) part.open = true")
        assert complaints(window) == []
        wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        assert window.execute_script(wide) == 0
        smallest = window.execute_script(
            "return Math.min(...[...document.querySelectorAll('svg.chart text')].map("
            "(text) => text.getBoundingClientRect().height).filter((height) => height > 0))"
        )
        assert smallest >= 8
        seen.add(background(window))
    assert len(seen) == 2


def test_the_button_turns_the_colours(window: Any, page: Path) -> None:
    resize(window, 1280, "light")
    window.get(page.as_uri())
    before, button = background(window), window.find_element("id", "theme")
    assert button.text == "Dark"
    button.click()
    assert (background(window) != before, button.text) == (True, "Light")
    button.click()
    assert (background(window), button.text) == (before, "Dark")


def test_a_click_on_a_head_sorts_by_number(window: Any, page: Path) -> None:
    resize(window, 1280, "light")
    window.get(page.as_uri())
    table = next(t for t in window.find_elements("css selector", "table.sortable") if "Every run" in t.text)
    head = next(h for h in table.find_elements("css selector", "thead th") if h.text.startswith("sent"))
    column = window.execute_script("return arguments[0].cellIndex", head)

    def values() -> list[float]:
        cells = f"[...arguments[0].tBodies[0].rows].map((row) => Number(row.cells[{column}].dataset.v))"
        return list(window.execute_script(f"return {cells}", table))

    before = values()
    head.find_element("tag name", "button").click()
    assert values() == sorted(before)
    assert head.get_attribute("aria-sort") == "ascending"
    head.find_element("tag name", "button").click()
    assert values() == sorted(before, reverse=True)
    assert len(set(before)) > 1
    assert complaints(window) == []


ROUNDS = "return document.querySelector('.tiles').textContent.replace(/\\s+/g, ' ')"


@pytest.fixture
def growing(suite: Path, tmp_path: Path) -> Iterator[tuple[Any, Path, str]]:
    """A served page of a run after one of its three rounds, its metrics file, and what this file is to hold."""
    folder = tmp_path / "run"
    shutil.copytree(suite / "runs" / "all clients" / "glora" / "seed-0", folder)
    file = folder / "metrics.jsonl"
    whole = file.read_text()
    (folder / "summary.json").unlink()
    file.write_text("".join(whole.splitlines(keepends=True)[:1]))
    live = reporting.serve([folder], diagnostics_in_words)
    thread = threading.Thread(target=live.run)
    thread.start()
    try:
        yield live, file, whole
    finally:
        live.stop()
        thread.join(10)
    assert not thread.is_alive()


def comes(window: Any, text: str) -> bool:
    until = time.monotonic() + 60
    while text not in window.execute_script(ROUNDS) and time.monotonic() < until:
        time.sleep(0.2)
    return text in window.execute_script(ROUNDS)


def test_the_live_page_follows_a_run(window: Any, growing: tuple[Any, Path, str]) -> None:
    live, file, whole = growing
    try:
        window.get(live.url)
        assert "rounds1of 3" in window.execute_script(ROUNDS)
        file.write_text(whole)
        assert comes(window, "rounds3of 3")
        assert window.find_element("id", "live").text.endswith("live")
        assert complaints(window) == []
    finally:
        window.get("about:blank")


@pytest.mark.parametrize("wrong", ["late", "refused"])
def test_the_live_page_ends_with_the_newest_state(window: Any, growing: tuple[Any, Path, str], wrong: str) -> None:
    """An answer that comes late is not shown over a newer one, and one that is refused is asked for again."""
    live, file, whole = growing
    try:
        window.get(live.url)
        time.sleep(2)  # the first event has been answered
        window.execute_script(
            """
            const [wrong] = arguments, real = window.fetch;
            window.asked = 0;
            window.fetch = async (...given) => {
              const answer = await real(...given), first = ++window.asked === 1;
              if (first && wrong === "late") await new Promise((resolve) => setTimeout(resolve, 4000));
              return first && wrong === "refused" ? new Response("", { status: 503 }) : answer;
            };
            """,
            wrong,
        )
        lines = whole.splitlines(keepends=True)
        if wrong == "late":
            file.write_text("".join(lines[:2]))
            until = time.monotonic() + 60
            while window.execute_script("return window.asked") < 1 and time.monotonic() < until:
                time.sleep(0.05)
        file.write_text(whole)
        time.sleep(6)
        assert comes(window, "rounds3of 3")
        assert window.execute_script("return window.asked") > 1
    finally:
        window.get("about:blank")
