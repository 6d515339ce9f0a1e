"""The time until which the certificates of a deployment are valid: warnings before its end, and a refusal after it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

from cryptography import x509

from fedspan.support.errors import FedspanError

WARNING = timedelta(days=30)
"""Before the end of a certificate's validity, from which on there are warnings."""
CERTIFICATES = ("server.crt", "ca.crt")
"""Names of the certificates in a server's folder; a site has the second one."""
_RENEWAL = {
    "server.crt": "`fedspan flower keys rotate` at the server makes a new one",
    "ca.crt": "a new deployment (`fedspan flower init`) makes a new authority",
}


@dataclass(frozen=True, slots=True)
class Validity:
    """The times between which a certificate is valid."""

    path: Path
    since: datetime
    until: datetime

    def problem(self, now: datetime) -> str | None:
        """Return why the certificate cannot be used, in one line, or None."""
        if now < self.since:
            return f"{self.path} is valid from {_shown(self.since)} on: expected this machine's clock to be right"
        if now >= self.until:
            return f"{self.path} has expired on {_shown(self.until)}: expected a valid certificate; {self._renewal()}"
        return None

    def warning(self, now: datetime) -> str | None:
        """Return the line that says how soon it ends, or None where that is more than 30 days away."""
        if self.until - now >= WARNING:
            return None
        days = (self.until - now).days
        return f"{self.path} expires in {days} day{'s' * (days != 1)}, on {_shown(self.until)}; {self._renewal()}"

    def _renewal(self) -> str:
        return _RENEWAL.get(self.path.name, "`fedspan flower keys rotate` makes a server's, `init` an authority's")


def validity(path: Path) -> Validity:
    """Return the validity of the certificate in a file.

    Raises
    ------
    FedspanError
        When the file holds none.
    """
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it holds none"
        raise FedspanError(f"{path} cannot be read ({reason}): expected a certificate in PEM") from None
    return Validity(path, certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def check(paths: Iterable[Path], now: datetime | None = None) -> list[str]:
    """Return the warnings about certificates that expire within 30 days.

    Raises
    ------
    FedspanError
        For one that is not valid now.
    """
    at = datetime.now(UTC) if now is None else now
    found = [validity(path) for path in paths]
    for each in found:
        problem = each.problem(at)
        if problem is not None:
            raise FedspanError(problem)
    return [line for each in found if (line := each.warning(at)) is not None]


def of_folder(folder: Path) -> list[Validity]:
    """Return the validity of the certificates that are in a server's or a site's folder."""
    return [validity(folder / name) for name in CERTIFICATES if (folder / name).exists()]


def given(arguments: list[str], options: Iterable[str]) -> list[Path]:
    """Return the files that a command's arguments name after these options, as `--option FILE` or `--option=FILE`."""
    found = []
    for option in options:
        following = [after for before, after in pairwise(arguments) if before == option]
        joined = [each.partition("=")[2] for each in arguments if each.startswith(f"{option}=")]
        found += [Path(each) for each in (*following, *joined)]
    return found


def _shown(time: datetime) -> str:
    return f"{time:%Y-%m-%d %H:%M} UTC"
