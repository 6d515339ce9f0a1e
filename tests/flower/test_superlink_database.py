"""Requests of a SuperLink wait for others that write, instead of failing after five seconds."""

from __future__ import annotations

import pytest
from flwr.supercore import sql_mixin
from sqlalchemy import create_engine, event, text

from fedspan.flower import superlink_database
from fedspan.flower.superlink_database import WAIT
from fedspan.support.errors import FedspanError


def settings() -> dict[str, object]:
    """The settings of a connection that Flower opens."""
    engine = create_engine("sqlite:///:memory:")
    event.listen(engine, "connect", sql_mixin._set_sqlite_pragmas)
    with engine.connect() as connection:
        names = ("busy_timeout", "foreign_keys", "synchronous")
        return {name: connection.execute(text(f"PRAGMA {name}")).scalar() for name in names}


def test_a_request_waits_for_others_that_write(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", sql_mixin.SQLITE_PRAGMAS)
    before = settings()
    assert before["busy_timeout"] == 5000
    superlink_database.wait_for_writers()
    assert settings() == {**before, "busy_timeout": 1000 * WAIT}


def test_another_flower_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sql_mixin, "SQLITE_PRAGMAS", (("journal_mode", "WAL"),))
    with pytest.raises(FedspanError, match="sets no busy_timeout"):
        superlink_database.wait_for_writers()
