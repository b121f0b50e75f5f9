"""The certificate authority of one family of sandboxes, and the leaf certificates that it signs.

Keys are made here and live in memory; nothing here writes a file.
"""

from __future__ import annotations

import datetime
import os
import ssl

from anyio.abc import ByteStream
from anyio.streams.tls import TLSStream
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CA_DAYS = 3650
_LEAF_DAYS = 30
_KEPT_CONTEXTS = 64
_SLACK = datetime.timedelta(days=1)
"""Clocks in sandboxes can be behind."""


def make_authority() -> tuple[bytes, bytes]:
    """A fresh authority: certificate and private key, both PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "podflare egress of one sandbox")])
    identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    usage = _usage(sign_certificates=True)
    certificate = (
        _certificate(name, name, key.public_key(), _CA_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(identifier, critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM), _key_pem(key)


class Authority:
    """Signs leaf certificates with what `make_authority` made."""

    def __init__(self, certificate_pem: bytes, key_pem: bytes) -> None:
        self._certificate = x509.load_pem_x509_certificate(certificate_pem)
        key = serialization.load_pem_private_key(key_pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        self._key = key
        self._contexts: dict[str, ssl.SSLContext] = {}

    async def serve_tls(self, stream: ByteStream, host: str) -> TLSStream:
        """The server's side of TLS over `stream`, as `host`.

        Raises: OSError (ssl.SSLError), anyio.BrokenResourceError, anyio.EndOfStream if the client does not go along.
        """
        context = self._contexts.pop(host, None) or self.server_context(host)
        self._contexts[host] = context  # at the end: the newest
        if len(self._contexts) > _KEPT_CONTEXTS:
            del self._contexts[next(iter(self._contexts))]
        return await TLSStream.wrap(stream, server_side=True, ssl_context=context, standard_compatible=False)

    def server_context(self, host: str) -> ssl.SSLContext:
        """A TLS server's settings with a fresh certificate for `host`, which speaks HTTP/1.1 only."""
        key = ec.generate_private_key(ec.SECP256R1())
        common = host if len(host) <= 64 else "host"  # the longest that the field holds; clients look at the other
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
        signer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = (
            _certificate(name, self._certificate.subject, key.public_key(), _LEAF_DAYS)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(signer, critical=False)
            .sign(self._key, hashes.SHA256())
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        # The module reads certificates from files only; a memory file has a name in /proc.
        memory = os.memfd_create("podflare-leaf", os.MFD_CLOEXEC)
        try:
            os.write(memory, certificate.public_bytes(serialization.Encoding.PEM) + _key_pem(key))
            context.load_cert_chain(f"/proc/self/fd/{memory}")
        finally:
            os.close(memory)
        return context


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SLACK)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
