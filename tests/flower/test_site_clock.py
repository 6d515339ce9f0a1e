"""A site's clock is found wrong by what is certain alone."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.supercore.primitives.asymmetric import generate_key_pairs

from fedspan.flower import site_clock
from fedspan.flower.site_clock import ClockWatch

BEGAN = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("taken", "written", "reported"),
    [
        (0.2, 0.1, False),
        (0.2, 20.0, True),  # the server's clock is 20 s ahead
        (0.2, -20.0, True),
        (14.0, 0.1, False),  # a large piece, and a busy server that wrote its answer at once, or last
        (14.0, 13.9, False),
        (14.0, 34.0, True),
    ],
)
def test_a_request_that_takes_long_is_no_wrong_clock(
    monkeypatch: pytest.MonkeyPatch, taken: float, written: float, reported: bool
) -> None:
    monkeypatch.setattr(site_clock, "now", lambda: next(times))
    monkeypatch.setattr("flwr.supernode.node_auth_http_interceptor.now", lambda: BEGAN)
    monkeypatch.setattr(ClockWatch, "_reported", 0.0)
    lines: list[str] = []
    monkeypatch.setattr(site_clock._log, "error", lambda text, *given: lines.append(text % given))
    times = iter([BEGAN, BEGAN + timedelta(seconds=taken)])
    date = format_datetime(BEGAN + timedelta(seconds=written), usegmt=True)
    context: Any = SimpleNamespace(request=httpx.Request("POST", "https://server"))
    ClockWatch(*generate_key_pairs()).intercept(context, lambda _: httpx.Response(200, headers={"date": date}))
    assert bool(lines) == reported
