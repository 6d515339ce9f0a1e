"""The sources of an audit's model and rows: a run of simulated clients, or any trained model with files of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedspan.auditing import rows as audit_rows
from fedspan.auditing.bounds import Guarantee
from fedspan.auditing.canaries import CanaryKey, label_id
from fedspan.auditing.rows import AuditRows
from fedspan.auditing.subject import Loaded, Subject
from fedspan.config import Config
from fedspan.data import Corpus, Rows
from fedspan.data import load as load_data
from fedspan.data.rows import concatenate
from fedspan.federation import requirements
from fedspan.federation.clients import Client, make_clients, pooled, site_test_rows
from fedspan.methods.base import Method
from fedspan.runs import checkpoint
from fedspan.runs.identity import identity
from fedspan.runs.trained import Trained, find_trained
from fedspan.support.enclosing import enclosing_run
from fedspan.support.errors import FedspanError


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """Everything that an audit is about."""

    subject: Subject
    rows: AuditRows
    facts: Mapping[str, Any]
    """Base, data, method, rounds and such, for the dossier."""
    guarantee: Guarantee | None
    """The bound on an attack on one row; None where there is none."""
    privacy: str
    """One sentence on ε and δ."""
    work: SiteWork | None = None
    """The sites' first round, to be done again; None where their rows are not known."""


@dataclass(frozen=True, slots=True, eq=False)
class SiteWork:
    """The means to do again what a site did in the first round."""

    config: Config
    method: Method
    clients: tuple[Client, ...]
    """Those that took part in the run."""
    num_clients: int
    train: Rows


def find_source(
    where: Path,
    members: Sequence[str],
    others: Sequence[str],
    settings: Sequence[str],
    base: str | None,
    most: int,
    key: CanaryKey | None = None,
) -> Source:
    """Return the model in a folder and the rows to attack it with.

    Raises
    ------
    FedspanError
        For a folder without a trained model, or without rows that are known to be members or non-members.
    """
    if bool(members) != bool(others):
        missing = "--nonmembers" if members else "--members"
        raise FedspanError(
            f"{missing} is not given: expected files of both, rows of the training and comparable others"
        )
    trained = find_trained(where, settings, base)
    if members:
        return _with_files(where, trained, members, others, most, key)
    if not (where / "config.toml").is_file():
        raise FedspanError(
            f"{where} is an adapter, which does not say what it was trained on: expected --members and --nonmembers"
            f"{enclosing_run(where)}"
        )
    if (where / "sites.json").exists():
        raise FedspanError(
            f"{where} is a federation of real sites, whose training rows are there: expected --members and "
            "--nonmembers, at a site with its own rows"
        )
    return _of_run(where, trained, most, key)


def _with_files(
    where: Path, trained: Trained, members: Sequence[str], others: Sequence[str], most: int, key: CanaryKey | None
) -> Source:
    ours, theirs = (trained.read(list(names), unlabelled=False) for names in (members, others))
    names = tuple(", ".join(Path(name).name for name in given) for given in (members, others))
    seed = trained.config.seed
    rows = audit_rows.from_files(
        ours.rows, theirs.rows, (names[0], names[1]), most, seed, _planted(key, trained.labels.names)
    )
    corpus = replace(ours, rows=concatenate([rows.members, rows.others])).corpus(trained.labels, ())
    run = (where / "config.toml").is_file()
    subject = _subject(trained, corpus)
    guarantee, said = _privacy(where, trained.config) if run else (None, "An adapter's folder says nothing of ε and δ.")
    if run and (where / "sites.json").exists() and trained.config.privacy.dp == "example":
        said = "Each site's own ledger has its ε; the server does not know it."
    return Source(subject, rows, _facts(where, trained.config, None), guarantee, said)


def _subject(trained: Trained, corpus: Corpus) -> Subject:
    """Return a trained model with the base of a run, or with the base that an adapter is for."""
    loaded = Loaded.of(trained.config, corpus, trained.trains, trained.max_rank)
    if trained.broadcast is not None:
        if trained.base is not None and loaded.context.model.digest() != trained.base:
            second = replace(corpus, ids_in_data=not corpus.ids_in_data)
            loaded = Loaded.of(trained.config, second, trained.trains, trained.max_rank)
        _check_base(trained, loaded)
        return Subject(loaded, trained.broadcast, None, trained.notes)
    plain = trained.config.model.model_copy(update={"adapter": None})
    reference = Loaded.of(trained.config.model_copy(update={"model": plain}), corpus, trained.trains, trained.max_rank)
    notes = trained.notes
    if reference.context.model.heads and reference.prepared.new_head is not None:
        notes = (*notes, "the base has no head for this task, so the reference is the base with a head drawn at random")
    return Subject(loaded, loaded.untouched, reference, notes)


def _check_base(trained: Trained, loaded: Loaded) -> None:
    if trained.base is not None and loaded.context.model.digest() != trained.base:
        name = trained.config.model.name
        raise FedspanError(f"model.name = {name!r} has other weights than the base of the run: expected that base")


def _of_run(where: Path, trained: Trained, most: int, key: CanaryKey | None) -> Source:
    # Which labels are numbers depends on the metrics.
    data = trained.config.data.model_copy(update={"metrics": trained.metrics})
    config = trained.config.model_copy(update={"data": data})
    method = requirements.chosen(config)
    saved = checkpoint.read(where / "checkpoint" / "federation.safetensors")
    corpus = load_data(config.data, config.data_seed)
    clients = make_clients(corpus, config.federation, config.federation_seed, config.data.client_holdout)
    loaded = Loaded.of(
        config, corpus, method.info.trains, max(c.rank for c in clients), requirements.galore_rank(method)
    )
    _check_base(trained, loaded)
    _check_data(where, config, saved.identity, loaded)
    sites, notes = _participants(clients, method, saved.counted)
    kept = {c.client_id: c.holdout for c in sites if len(c.holdout)}
    read = loaded.prepared.corpus
    held_out, own_tests, source = _held_out(read, config, kept)
    planted = _planted(key, read.label_names)
    trained_on = {c.client_id: c.indices for c in sites}
    rows = audit_rows.of_sites(read.train, held_out, trained_on, own_tests, most, config.seed, source, notes, planted)
    assert trained.broadcast is not None  # a run's final model, since it was found in its checkpoint
    guarantee, said = _privacy(where, config)
    # A control has no server to send messages to.
    work = SiteWork(config, method, tuple(sites), len(clients), read.train)
    with_messages = not (method.info.pooled or method.info.alone)
    subject = Subject(loaded, trained.broadcast, None, trained.notes)
    facts = _facts(where, config, len(sites))
    return Source(subject, rows, facts, guarantee, said, work if with_messages else None)


def _planted(key: CanaryKey | None, names: Sequence[str] | None) -> set[bytes]:
    """Return the digests of the rows that were planted."""
    if key is None:
        return set()
    rows = (key.rows(c, [c.secret], label_id(c, names)) for c in key.canaries if c.repeats)
    return {digest for row in rows for digest in audit_rows.keys_of(row)}


def _participants(
    clients: list[Client], method: Method, counted: Mapping[str, int]
) -> tuple[list[Client], tuple[str, ...]]:
    """Return the sites whose rows the model was trained on, and notes.

    Parameters
    ----------
    counted
        Client -> when its answer last counted, without those that never took part.
    """
    if method.info.pooled:
        return pooled(clients), ()
    sites = [client for client in clients if client.client_id in counted] or clients
    idle = len(clients) - len(sites)
    line = f"{idle} of {len(clients)} sites were never drawn for a round, and their rows are left out"
    return sites, (line,) if idle else ()


def _held_out(read: Corpus, config: Config, kept: Mapping[str, np.ndarray]) -> tuple[Rows, dict[str, np.ndarray], str]:
    """Return the non-members (the test rows, and what the sites kept back of their own data), each site's, and a name.

    Parameters
    ----------
    read
        The corpus with the base's label ids.
    kept
        Site -> the rows of the training data that it kept back.
    """
    own_tests = dict(site_test_rows(read, config.federation))
    if not kept:
        return read.test, own_tests, "the run's test rows"
    start = len(read.test)
    for name, places in kept.items():
        own = np.arange(start, start + len(places))
        own_tests[name] = np.concatenate([own_tests[name], own]) if name in own_tests else own
        start += len(places)
    rows = concatenate([read.test, read.train.take(np.concatenate(list(kept.values())))])
    return rows, own_tests, "the run's test rows and the sites' own held-out rows"


def _check_data(where: Path, config: Config, began: Mapping[str, Any], loaded: Loaded) -> None:
    """Refuse data that has changed since: rows that were not trained on would be attacked as if they had been."""
    now = identity(config, "", loaded.prepared.data)["data"]
    for split in ("train", "test"):
        if began.get("data", {}).get(split) != now.get(split):
            raise FedspanError(
                f"the {split} data of {where} is not what the run began with: expected the same files, or --members "
                f"and "
                "--nonmembers"
            )


def _summary(where: Path) -> Mapping[str, Any]:
    found = json.loads((where / "summary.json").read_text(encoding="utf-8"))
    return found if isinstance(found, dict) else {}


def _privacy(where: Path, config: Config) -> tuple[Guarantee | None, str]:
    """Return the guarantee of a run for one training row, and a sentence on it."""
    privacy, epsilon = config.privacy, _summary(where).get("epsilon")
    if privacy.dp == "none":
        return None, "The run has no differential privacy: nothing bounds in advance what an attack can find."
    if not isinstance(epsilon, int | float) or privacy.noise_multiplier == 0:
        return None, "The run clips but adds no noise (or its ε is not known): nothing bounds what an attack can find."
    given = f"ε = {epsilon:.3g} at δ = {privacy.delta:g}"
    if privacy.dp == "example":
        found = Guarantee(float(epsilon), privacy.delta, f"{given} for every training row, by the sites' ledgers")
        once = "a row that is there k times with kε"
        return found, f"Every training row is protected with {given}, by the ledgers of the run ({once})."
    whole = Guarantee(float(epsilon), privacy.delta, f"{given} for every site as a whole, by the run's ledger")
    row = whole.for_one_row()
    return row, (
        f"Every site as a whole is protected with {given}, by the ledger of the run; for a single row this means "
        f"ε = {row.epsilon:.3g} at δ = {row.delta:.2g}."
    )


def _result(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return how good the model is, against which what it gives away is weighed; nothing where nobody has judged it."""
    metric, value, base = (summary.get(key) for key in ("metric", "federated", "base"))
    if metric is None or not isinstance(value, float):
        return {}
    compared = f" (the untouched base: {base:.3f})" if isinstance(base, float) else ""
    return {"result": f"{metric} {value:.3f}{compared}"}


def _facts(where: Path, config: Config, sites: int | None) -> dict[str, Any]:
    """Return what the audited model is."""
    if not (where / "config.toml").is_file():
        return {"folder": where.name, "base": Path(config.model.name).name, "what": "a PEFT adapter"}
    summary = _summary(where)
    return {
        "folder": where.name,
        "what": "the final model of a run",
        "base": config.model.name if ":" in config.model.name else Path(config.model.name).name,
        "data": config.data.task,
        "method": config.method["name"],
        "rounds": config.federation.rounds,
        **_result(summary),
        "clients": len(summary.get("clients") or ()) or config.federation.num_clients,
        **({"clients that took part": sites} if sites is not None else {}),
        "seed": config.seed,
        "differential privacy": config.privacy.dp,
        "secure sums": "yes" if config.privacy.secure_sums else "no",
    }
