"""How engines may be asked: scheme and path, whom to trust, who we are.

Certificates and tokens that are mounted as files get renewed; both are looked at for change (by `stat`) and read again, without a restart.
What can't be read again leaves the last in use. Not here: HTTP (fetch).
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

from epp.errors import StartError
from epp.types import Address

TOKEN_CHECK_S = 1.0
"""How often the bearer token's file is looked at for a change."""
TOKEN_BYTES_MAX = 64 << 10

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchOptions:
    """Where and how engines are asked. Raises ValueError that says which option is wrong."""

    scheme: str = "http"
    path: str = ""
    """Empty: where the engine's family has it."""
    port: int = 0
    """0: the endpoint's own."""
    ca_path: str = ""
    """PEM file of the authorities trusted for https; empty: the system's."""
    insecure_skip_verify: bool = False
    server_name: str = ""
    """The name the certificate must be for; empty: the endpoint's IP address."""
    client_cert_path: str = ""
    client_key_path: str = ""
    """Empty: the key is in the certificate's file."""
    bearer_token_file: str = ""
    """Sent as `Authorization: Bearer`; read again when it changes."""

    def __post_init__(self) -> None:
        if self.scheme not in {"http", "https"}:
            raise ValueError(f"scheme: {self.scheme!r} is not http or https")
        if self.path and not (self.path.startswith("/") and self.path.isascii() and self.path.isprintable() and " " not in self.path):
            raise ValueError(f"path: {self.path!r} is not the path of a URL")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port: {self.port} is not 0 to 65535")
        if self.client_key_path and not self.client_cert_path:
            raise ValueError("clientKeyPath: needs clientCertPath")

    def url(self, address: Address, path: str) -> str:
        return f"{self.scheme}://{Address(address.host, self.port or address.port)}{path}"


class _Files:
    """A set of files, looked at for change: mounted secrets are replaced, not written to."""

    def __init__(self, *paths: str) -> None:
        self._paths = [Path(path) for path in paths if path]
        self._seen: list[tuple[int, int, int]] = []
        self.changed()

    def changed(self) -> bool:
        """Since the last call. Files that can't be had now have not changed."""
        try:
            now = [(stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in (path.stat() for path in self._paths)]
        except OSError:
            return False
        changed, self._seen = now != self._seen, now
        return changed


class Token:
    """The bearer token, as a line of a request's head; without a file an empty one. Raises StartError if it can't be read at first."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._files = _Files(path)
        self._checked_s = float("-inf")
        self.line = self._read() if path else ""

    def renewed(self, now_s: float) -> bool:
        """Whether `line` is another one than at the last call."""
        if not self._path or now_s - self._checked_s < TOKEN_CHECK_S:
            return False
        self._checked_s = now_s
        if not self._files.changed():
            return False
        before = self.line
        try:
            self.line = self._read()
        except StartError as error:
            _log.warning("the bearer token for engines can't be read again; the old one stays", extra={"fields": {"error": str(error)}})
        return self.line != before

    def _read(self) -> str:
        try:
            with Path(self._path).open("rb") as file:
                token = file.read(TOKEN_BYTES_MAX).strip()
        except OSError as error:
            raise StartError(f"the bearer token for engines can't be read ({self._path}): {error.strerror}") from None
        if not token or not token.isascii() or not token.decode().isprintable() or b" " in token:
            raise StartError(f"the bearer token for engines can't be used ({self._path}): the file holds no token")
        return f"Authorization: Bearer {token.decode()}\r\n"


class Tls:
    """The context of our side of https, made anew when a file it was made of changed. Raises StartError if it can't be made at first."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._files = _Files(options.ca_path, options.client_cert_path, options.client_key_path)
        self._context = _context(options)

    def context(self) -> ssl.SSLContext:
        if self._files.changed():
            try:
                self._context = _context(self._options)
            except StartError as error:
                _log.warning("certificates for engines can't be read again; the old ones stay", extra={"fields": {"error": str(error)}})
        return self._context


def _context(options: FetchOptions) -> ssl.SSLContext:
    """Verifying unless told not to."""
    what, path = "CA certificates for engines", options.ca_path
    try:
        context = ssl.create_default_context(cafile=options.ca_path or None)
        if options.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if options.client_cert_path:
            what, path = "the client certificate for engines", options.client_cert_path
            context.load_cert_chain(options.client_cert_path, options.client_key_path or None)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise StartError(f"{what} can't be used ({path}): {getattr(error, 'strerror', None) or error}") from None
    return context
