"""Settings of the gateway: what it takes, what it refuses to begin with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from podflare.errors import BadRequest
from podflare.integrations.anthropic.gateway.config import configure

KEYS = {"PODFLARE_GATEWAY_KEYS": "one, two", "PODFLARE_GATEWAY_UPSTREAM_KEY": "up"}


def test_an_address_that_others_reach_needs_keys_or_a_word() -> None:
    """Loopback needs nothing; anything else needs the gateway's own keys, or somebody who says that it is meant."""
    for host in ("127.0.0.1", "::1", "localhost", "127.8.8.8"):
        assert configure({}, host=host).host == host
    for host in ("0.0.0.0", "::", "10.0.0.1", "gateway.example"):
        with pytest.raises(BadRequest, match="PODFLARE_GATEWAY_KEYS"):
            configure({}, host=host)
        assert configure(KEYS, host=host).keys == {"one", "two"}
        assert configure({"PODFLARE_GATEWAY_AUTH_DISABLED": "1"}, host=host).open_to_all


def test_secrets_are_not_in_the_text_of_the_settings(tmp_path: Path) -> None:
    """Whoever prints the settings prints no key; the file is stronger than the environment."""
    (tmp_path / "key").write_text("from-file\n")
    config = configure(KEYS, upstream_key_file=tmp_path / "key")
    assert config.upstream_key == "from-file"
    assert not any(secret in repr(config) for secret in ("from-file", "one", "two"))


@pytest.mark.parametrize(
    ("environment", "options", "says"),
    [
        ({"PODFLARE_GATEWAY_KEYS": "a"}, {}, "PODFLARE_GATEWAY_UPSTREAM_KEY"),
        ({"PODFLARE_GATEWAY_UPSTREAM_KEY": "a\nb"}, {}, "no header"),
        ({"PODFLARE_GATEWAY_UPSTREAM": "ftp://x"}, {}, "http"),
        ({}, {"upstream": "https://x/?a=b"}, "http"),
        ({}, {"idle_s": 0}, "--idle-timeout"),
        ({}, {"cell_s": 1e9}, "--cell-timeout"),
        ({}, {"upstream_key_file": Path("/nonexistent")}, "cannot be read"),
        ({"PODFLARE_GATEWAY_MAX_FILE_MIB": "-1"}, {}, "MAX_FILE_MIB"),
        ({"PODFLARE_GATEWAY_PING_SECONDS": "often"}, {}, "PING_SECONDS"),
    ],
)
def test_settings_that_cannot_work_are_refused(environment: dict[str, str], options: dict[str, Any], says: str) -> None:
    """Each with words that name the setting."""
    with pytest.raises(BadRequest, match=says):
        configure(environment, **options)


def test_options_are_stronger_than_the_environment() -> None:
    """The address of the API, without a trailing slash."""
    environment = {"PODFLARE_GATEWAY_UPSTREAM": "http://one/", "PODFLARE_GATEWAY_MAX_BODY_MIB": "3"}
    assert configure(environment).upstream == "http://one"
    assert configure(environment, upstream="http://two/x/").upstream == "http://two/x"
    assert configure(environment).max_body_bytes == 3 << 20
