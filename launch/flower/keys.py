"""Makes certificates and keys for a server and its clients.

    python -m jaxfm.launch.flower keys --clients=4 --hosts=fed.example.org,192.0.2.7

    ca.pem, ca.key           an authority of your own, which signs the server's certificate
    server.pem, server.key   TLS of the server, for the hosts named
    client-N.pub, .key       a client's key; the server registers the public half under its name

A client's machine gets ca.pem and its own client-N.key, the server's all but these. Who holds
ca.key can make servers that clients trust: keep it off both.
"""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import os
import pathlib
from typing import Any

from jaxfm.config import check, check_whole, option
from jaxfm.launch.flower.processes import need_flower

_OWN = ("localhost", "127.0.0.1")  # where the server's own processes reach it


@dataclasses.dataclass(frozen=True)
class KeysConfig:
    """Keys of a run's machines."""

    folder: str = option("certificates", "where they are written; existing files stay")
    clients: int = option(4, "clients, numbered from 0")
    hosts: tuple[str, ...] = option(
        (), "names and addresses that clients reach the server at, besides this machine's own"
    )
    days: int = option(365, "for which certificates are valid")

    def __post_init__(self):
        check(self)
        check_whole(self, {"clients": 1, "days": 1})
        if not all(self.hosts):
            raise ValueError(f"hosts={self.hosts}: give the server's names or addresses.")


CONFIG = KeysConfig


def main(config: KeysConfig) -> None:
    """Writes what is missing."""
    need_flower()
    now = datetime.datetime.now(datetime.UTC)
    until = now + datetime.timedelta(days=config.days)
    made = make_keys(pathlib.Path(config.folder), config.clients, config.hosts, now, until)
    print(f"{len(made)} files are new in {config.folder}.")


def make_keys(
    folder: pathlib.Path,
    clients: int,
    hosts: tuple[str, ...],
    start: datetime.datetime,
    until: datetime.datetime,
) -> list[pathlib.Path]:
    """Writes the files that are missing in the folder; returns their paths.

    Args:
      clients: how many.
      hosts: of the server.
      start, until: when certificates are valid.
    """
    from cryptography.hazmat.primitives import serialization as form

    folder.mkdir(parents=True, exist_ok=True)
    made: list[pathlib.Path] = []

    def write(name: str, content: bytes) -> None:
        path = folder / name
        mode = 0o600 if name.endswith(".key") else 0o644
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
        made.append(path)

    names = ("ca.pem", "ca.key", "server.pem", "server.key")
    there = [name for name in names if (folder / name).exists()]
    if not there:
        for name, content in _certificates((*hosts, *_OWN), start, until).items():
            write(name, content)
    elif missing := [name for name in names[::2] if name not in there]:
        raise ValueError(
            f"{folder} has {there[0]} and lacks {missing[0]}: remove {', '.join(there)} to make "
            "them anew, or give another folder."
        )
    for number in range(clients):
        if (folder / f"client-{number}.key").exists():
            continue
        key = _new_key()
        write(f"client-{number}.key", _private(key))
        public = key.public_key().public_bytes(form.Encoding.OpenSSH, form.PublicFormat.OpenSSH)
        write(f"client-{number}.pub", public)
    return made


def _new_key() -> Any:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP384R1())


def _private(key: Any) -> bytes:
    """As Flower reads a node's key: OpenSSH's format, without a passphrase."""
    from cryptography.hazmat.primitives import serialization as form

    return key.private_bytes(form.Encoding.PEM, form.PrivateFormat.OpenSSH, form.NoEncryption())


def _certificates(
    hosts: tuple[str, ...], start: datetime.datetime, until: datetime.datetime
) -> dict[str, bytes]:
    """The authority and the server: files by name."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    named = lambda text: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
    authority, server = _new_key(), _new_key()

    def signed(subject: str, key: Any, is_authority: bool) -> Any:
        builder = (
            x509.CertificateBuilder()
            .subject_name(named(subject))
            .issuer_name(named("jaxfm authority"))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(start)
            .not_valid_after(until)
            .add_extension(x509.BasicConstraints(is_authority, 0 if is_authority else None), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), False
            )
            .add_extension(_usage(is_authority), True)
        )
        if not is_authority:
            names = x509.SubjectAlternativeName([_host(host) for host in hosts])
            builder = builder.add_extension(names, False).add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False
            )
        return builder.sign(authority, hashes.SHA384())

    pem = form.Encoding.PEM
    plain = lambda key: key.private_bytes(pem, form.PrivateFormat.PKCS8, form.NoEncryption())
    return {
        "ca.pem": signed("jaxfm authority", authority, True).public_bytes(pem),
        "ca.key": plain(authority),
        "server.pem": signed("jaxfm server", server, False).public_bytes(pem),
        "server.key": plain(server),
    }


def _usage(is_authority: bool) -> Any:
    """What a key is for: signing certificates, or TLS."""
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> Any:
    """A name or an address, as certificates name them."""
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
