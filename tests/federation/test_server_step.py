"""The guard of the server's step: a model, or one line; never a traceback or a model that is not finite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from fedspan.client.training import LocalResult
from fedspan.federation.clients import Client
from fedspan.federation.rounds import RoundFailed
from fedspan.methods import METHODS
from fedspan.methods.base import Method
from fedspan.methods.messages import Broadcast


def spoilt(method: Method) -> Method:
    """The same method, with a step that gives NaN from numbers that are large, which one of the clients sends."""

    def encode(update: Any, sent: Broadcast, state: Any) -> Any:
        update, kept = method.encode(update, sent, state)
        if update.client_id == "client-1":
            update = replace(update, modules={n: p.map(lambda t: t * 1e12) for n, p in update.modules.items()})
        return update, kept

    def finish(state: Any, partial: Any) -> Any:
        after, diagnostics = method.finish(state, partial)
        if max(float(t.abs().max()) for t in tiny.state_tensors(after).values() if t.numel()) > 1e6:
            modules = {n: {k: t * torch.nan for k, t in held.items()} for n, held in after.modules.items()}
            after = replace(after, modules=modules)
        return after, diagnostics

    return replace(method, encode=encode, finish=finish)


def work(client: Client, sent: Broadcast, round_num: int) -> LocalResult:
    return tiny.fake_work(client, sent, round_num)


@pytest.mark.parametrize("name", ["flexlora", "fedit", "glora"])
def test_a_step_without_a_finite_result_fails_the_round_and_names_the_culprit(name: str) -> None:
    """The steps of the methods here are right for all numbers that pass the checks: this stands for one that is not."""
    method = METHODS[name]()
    clients = tiny.clients(4, 4, 4)
    state = tiny.run_state(method, 4)
    tiny.run_round(method, state, clients, work)
    bad = spoilt(method)
    with pytest.raises(RoundFailed, match=r"^round 1: the server's step (cannot be computed|gives NaN)") as caught:
        tiny.run_round(bad, state, clients, work)
    if bad.exchanges[0].fold.kind == "collect":
        assert str(caught.value).endswith("; so it is with the update of client-1 alone")
    assert "\n" not in str(caught.value)


def test_a_decomposition_that_does_not_converge_fails_the_round() -> None:
    method = METHODS["fedit"]()

    def finish(state: Any, partial: Any) -> Any:
        torch.linalg.svd(torch.full((3, 3), torch.nan))

    with pytest.raises(RoundFailed, match="the server's step cannot be computed from the updates"):
        tiny.run_round(replace(method, finish=finish), tiny.run_state(method, 4), tiny.clients(4, 4), work)


def test_a_defect_of_a_method_is_no_failed_round() -> None:
    """It is to be seen, with its traceback."""
    method = METHODS["fedit"]()

    def finish(state: Any, partial: Any) -> Any:
        raise KeyError("x")

    with pytest.raises(KeyError):
        tiny.run_round(replace(method, finish=finish), tiny.run_state(method, 4), tiny.clients(4, 4), work)
