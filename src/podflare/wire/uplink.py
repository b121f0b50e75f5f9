"""A machine's way out, as both its ends see it: the addresses on it, and what the machine is told about it.

The link is point to point.  Inside is one interface; outside, the gate holds the other end of it and is everybody else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Dict, Tuple

INTERFACE = "eth0"
MACHINE_ADDRESS = "198.18.0.2"
"""Of the range for tests of networks (RFC 2544), which no host on the internet has."""
GATE_ADDRESS = "198.18.0.1"
"""The gate: name server, and HTTP proxy at PROXY_PORT."""
CALLER_ADDRESS = "198.18.0.3"
"""The source of what the gate lets in to the machine's listener."""
PROXY_PORT = 3128
MTU = 65520
LISTEN_BACKLOG = 256
PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
NO_PROXY_VARIABLES = ("NO_PROXY", "no_proxy")
CA_VARIABLES = (
    "SSL_CERT_FILE",
    "REQUESTS_CA_BUNDLE",
    "CURL_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
)
"""Where programs that bring certificates of their own look first."""


@dataclass(frozen=True)
class Uplink:
    """What a machine with a way out is born with."""

    environment: Tuple[Tuple[str, str], ...] = ()
    """Variables besides those that name the proxy and the certificates: the placeholders of secrets."""
    ca_pem: str = ""
    """A certificate that the machine trusts besides the usual ones; empty: none."""


def uplink_from_dict(body: Dict[str, Any]) -> Uplink:
    return Uplink(tuple((name, value) for name, value in body["environment"]), body["ca_pem"])
