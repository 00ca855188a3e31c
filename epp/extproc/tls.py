"""TLS for the ports: a given certificate, or for ext_proc a self-signed one made at start (nobody verifies it: protocol rule 13).

The ext_proc port speaks HTTP/2, the metrics port (`--metrics-cert-dir`) HTTP/1.1; who calls says which flags to name in an error.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from epp.errors import StartError

_log = logging.getLogger("epp.tls")

VALID_YEARS = 10
RELOAD_S = 1.0
"""How often a given certificate's files are read again: a few KB a second, and no file-system event to miss."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A certificate chain and its key, PEM."""

    certificate: bytes
    key: bytes


def load(cert_path: str, *, flag: str = "--cert-path") -> KeyPair:
    """`tls.crt` and `tls.key` from a directory (a mounted Kubernetes TLS secret). Raises StartError, which names `flag`."""
    directory = Path(cert_path)
    try:
        return KeyPair((directory / "tls.crt").read_bytes(), (directory / "tls.key").read_bytes())
    except OSError as error:
        raise StartError(f"{flag} {cert_path}: {error.strerror}: {error.filename}") from None


def self_signed() -> KeyPair:
    """A P-256 certificate for any name, valid ten years. (RSA-4096, the reference's choice, takes seconds to make and more CPU a handshake.)"""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Inference Ext")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=365 * VALID_YEARS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return KeyPair(
        certificate.public_bytes(serialization.Encoding.PEM),
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
    )


def server_context(
    pair: KeyPair, *, client_ca_file: str = "", client_ca_flag: str = "--client-ca-file", protocol: str = "h2"
) -> ssl.SSLContext:
    """TLS 1.2 or newer, ALPN `protocol`. `client_ca_file`: only clients with a certificate of that authority. Raises StartError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols([protocol])
    use(context, pair)
    if client_ca_file:
        try:
            context.load_verify_locations(client_ca_file)
        except (OSError, ssl.SSLError) as error:
            raise StartError(f"{client_ca_flag} {client_ca_file}: {error.strerror or error}") from None
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def use(context: ssl.SSLContext, pair: KeyPair) -> None:
    """Let new handshakes on `context` present this pair. Raises StartError if certificate and key do not fit together."""
    with _as_file(pair.certificate) as certificate, _as_file(pair.key) as key:  # the ssl module reads files only
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)  # a failure would leave `context` with half of it
            context.load_cert_chain(certificate, key)
        except (ssl.SSLError, ValueError) as error:
            raise StartError(f"the TLS certificate and key can't be used: {error}") from None


@contextlib.contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """In memory: a key does not touch a disk, and a file system that can't be written is no trouble."""
    with os.fdopen(os.memfd_create("tls"), "wb", buffering=0) as file:
        file.write(data)
        yield f"/proc/self/fd/{file.fileno()}"


class Reloader:
    """Presents a renewed certificate without a restart. `once` looks whether the files changed, by content.

    A pair that can't be read or does not fit together (half of it written) is left alone with one warning; the old one stays in use.
    """

    def __init__(self, cert_path: str, pair: KeyPair, present: Callable[[KeyPair], None], *, flag: str = "--cert-path") -> None:
        """`present` makes new handshakes use a pair; it raises StartError for one that does not fit together."""
        self._flag = flag
        self._cert_path = cert_path
        self._present = present
        self._tried = pair
        self._told = ""
        self.reloads_total = 0

    def once(self) -> None:
        try:
            pair = load(self._cert_path, flag=self._flag)
            if pair == self._tried:
                return
            self._tried = pair
            self._present(pair)
        except StartError as error:
            if self._told != str(error):
                self._told = str(error)
                _log.warning("the TLS certificate could not be reloaded; the old one stays", extra={"fields": {"error": str(error)}})
            return
        self._told = ""
        self.reloads_total += 1
        _log.info("TLS certificate reloaded", extra={"fields": {"directory": self._cert_path}})
