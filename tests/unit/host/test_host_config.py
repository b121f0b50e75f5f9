"""Settings, their variables, and the rule that decides whether a daemon may start."""

from __future__ import annotations

from pathlib import Path

import pytest

from podflare.errors import BadRequest
from podflare.host.auth import digest
from podflare.host.config import Config, check_start, default_template_dir, split_address


def test_variables_are_read():
    """Each variable of the daemon ends in its setting; keys are kept as digests only."""
    config = Config.from_environment(
        {
            "PODFLARE_HOSTD_ADDR": "[::1]:8080",
            "PODFLARE_API_KEYS": " a , b,,",
            "PODFLARE_LOG_FORMAT": "JSON",
            "PODFLARE_FC_POOL_SIZE": "9",
            "PODFLARE_REGION": "eu",
            "PODFLARE_PUBLIC_URL": "https://x",
            "PODFLARE_REQUIRE": "seccomp, memory_limit",
            "PODFLARE_DATA_DIR": "/data",
            "PODFLARE_IDLE_SECONDS": "60",
            "PODFLARE_HEARTBEAT_SECONDS": "0.5",
        }
    )
    assert (config.host, config.port, config.pool_size) == ("::1", 8080, 9)
    assert config.key_digests == (digest("a"), digest("b"))
    assert (config.log_format, config.region, config.public_url) == ("json", "eu", "https://x")
    assert config.require == ("seccomp", "memory_limit")
    assert (config.data_dir, config.idle_s, config.heartbeat_s) == (Path("/data"), 60, 0.5)


def test_the_network_of_sandboxes():
    """Nothing is reachable unless the operator says so; the private daemon has the same variables."""
    assert Config.from_environment({}).egress is False
    variables = {
        "PODFLARE_EGRESS": "api.example.com, *.example.org, 10.1.2.3",
        "PODFLARE_EGRESS_PRIVATE": "10.0.0.0/8",
        "PODFLARE_EGRESS_CA": "/ca.pem",
        "PODFLARE_EGRESS_RESOLVERS": "192.0.2.1, 192.0.2.2:5353",
    }
    for embedded in (False, True):
        config = Config.from_environment(variables, embedded=embedded, uds="/s")
        assert config.egress == ("api.example.com", "*.example.org", "10.1.2.3")
        assert [str(network) for network in config.egress_private] == ["10.0.0.0/8"]
        assert (config.egress_ca, config.egress_resolvers) == (Path("/ca.pem"), ("192.0.2.1", "192.0.2.2:5353"))
    assert Config.from_environment({"PODFLARE_EGRESS": "1"}).egress is True
    for wrong in ({"PODFLARE_EGRESS": "10.1.2.3"}, {"PODFLARE_EGRESS_PRIVATE": "x"}):
        with pytest.raises(BadRequest):
            Config.from_environment(wrong)


def test_the_disk_rate_of_virtual_machines():
    """There is none unless the operator names one, which holds for the private daemon too."""
    assert Config.from_environment({}).disk_rate_mib == Config.from_environment({}).disk_rate_operations == 0
    variables = {"PODFLARE_DISK_RATE_MIB": "50", "PODFLARE_DISK_RATE_OPERATIONS": "1000"}
    for embedded in (False, True):
        config = Config.from_environment(variables, embedded=embedded, uds="/s")
        assert (config.disk_rate_mib, config.disk_rate_operations) == (50, 1000)
    assert Config.from_environment(variables, disk_rate_mib=7).disk_rate_mib == 7
    with pytest.raises(BadRequest, match="PODFLARE_DISK_RATE_MIB must be a whole number from 0 up"):
        Config.from_environment({"PODFLARE_DISK_RATE_MIB": "-1"})


def test_given_beats_variables_and_none_is_not_given():
    """Options win over the environment; an option left out does not."""
    environ = {"PODFLARE_HOSTD_ADDR": "127.0.0.1:1", "PODFLARE_POOL_SIZE": "3"}
    config = Config.from_environment(environ, port=2, pool_size=None)
    assert (config.host, config.port, config.pool_size) == ("127.0.0.1", 2, 3)


def test_new_pool_variable_beats_its_alias():
    """PODFLARE_POOL_SIZE counts before the name that other daemons use."""
    config = Config.from_environment({"PODFLARE_FC_POOL_SIZE": "120", "PODFLARE_POOL_SIZE": "0"})
    assert config.pool_size == 0


def test_embedded_daemon_ignores_the_servers_variables():
    """A user's server settings do not change the private daemon: no keys, no lifetimes of its own."""
    environ = {"PODFLARE_API_KEYS": "k", "PODFLARE_HOSTD_ADDR": "0.0.0.0:1", "PODFLARE_POOL_SIZE": "99"}
    config = Config.from_environment(environ, embedded=True, uds="/s")
    assert config.open_to_all and config.lifetime_s is None and config.idle_s is None and config.pool_size == 2


def test_required_walls_hold_for_the_embedded_daemon_too():
    """PODFLARE_REQUIRE is a promise to the user wherever the sandbox runs."""
    config = Config.from_environment({"PODFLARE_REQUIRE": "seccomp"}, embedded=True)
    assert config.require == ("seccomp",)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PODFLARE_HOSTD_ADDR", "7070"),
        ("PODFLARE_HOSTD_ADDR", "host:port"),
        ("PODFLARE_HOSTD_ADDR", "host:70700"),
        ("PODFLARE_AUTH_DISABLED", "maybe"),
        ("PODFLARE_LOG_FORMAT", "xml"),
        ("PODFLARE_POOL_SIZE", "-1"),
        ("PODFLARE_POOL_SIZE", "many"),
        ("PODFLARE_REQUIRE", "a_moat"),
        ("PODFLARE_HEARTBEAT_SECONDS", "nan"),
        ("PODFLARE_HEARTBEAT_SECONDS", "often"),
    ],
)
def test_wrong_variable_is_named(name, value):
    """A value that cannot work is an error that names its variable, never a silent default."""
    with pytest.raises(BadRequest, match=name):
        Config.from_environment({name: value})


@pytest.mark.parametrize(
    ("settings", "outcome"),
    [
        ({"host": "127.0.0.1"}, "quiet"),
        ({"host": "127.3.2.1"}, "quiet"),
        ({"host": "::1"}, "quiet"),
        ({"host": "localhost"}, "quiet"),
        ({"uds": "/s", "host": "0.0.0.0"}, "quiet"),
        ({"host": "0.0.0.0"}, "refused"),
        ({"host": "::"}, "refused"),
        ({"host": "10.0.0.1"}, "refused"),
        ({"host": "box.example"}, "refused"),
        ({"host": "0.0.0.0", "auth_disabled": True}, "warned"),
        ({"host": "127.0.0.1", "auth_disabled": True}, "warned"),
        ({"host": "0.0.0.0", "key_digests": (b"x" * 32,)}, "quiet"),
    ],
)
def test_start_rule(settings, outcome):
    """Loopback needs no key; another address needs keys or an explicit, warned-about opt-out."""
    config = Config(**settings)
    if outcome == "refused":
        with pytest.raises(BadRequest, match="PODFLARE_API_KEYS"):
            check_start(config)
    else:
        assert bool(check_start(config)) == (outcome == "warned")


def test_engines():
    """Options and variable name engines in order, once each; only a private daemon whose variable is unset has more."""
    assert Config.from_environment({}).engines == ("process",)
    named = Config.from_environment({"PODFLARE_ENGINE": "b, a,b"})
    assert (named.engines, named.engines_on_request) == (("b", "a"), False)
    assert Config.from_environment({"PODFLARE_ENGINE": "x"}, engines=["a", "b,c"]).engines == ("a", "b", "c")
    private = Config.from_environment({}, embedded=True)
    assert (private.engines, private.engines_on_request) == (("process",), True)
    named = Config.from_environment({"PODFLARE_ENGINE": "a"}, embedded=True)
    assert (named.engines, named.engines_on_request) == (("a",), False)
    for wrong in ({"PODFLARE_ENGINE": ","}, {}):
        with pytest.raises(BadRequest, match="no engine"):
            Config.from_environment(wrong, engines=None if wrong else [""])


def test_addresses():
    """host:port in all its spellings."""
    assert split_address("127.0.0.1:7070") == ("127.0.0.1", 7070)
    assert split_address("[::]:1") == ("::", 1)


def test_where_templates_are(tmp_path):
    """The variable first, then the user's data directory; every daemon of a user finds the same ones."""
    found = default_template_dir({"PODFLARE_TEMPLATE_DIR": "/t", "XDG_DATA_HOME": str(tmp_path)})
    assert found == Path("/t")
    assert default_template_dir({"XDG_DATA_HOME": str(tmp_path)}) == tmp_path / "podflare" / "templates"
    environ = {"XDG_DATA_HOME": str(tmp_path), "PODFLARE_POOL_TEMPLATES": " a=1, b = 2,"}
    for options in ({}, {"embedded": True}):
        config = Config.from_environment(environ, **options)
        assert config.template_dir == tmp_path / "podflare" / "templates"
    assert Config.from_environment(environ).pool_templates == (("a", 1), ("b", 2))


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=-1", "a=b", "a=1;b=2"])
def test_wrong_pools_are_refused(text):
    """PODFLARE_POOL_TEMPLATES is a list of TEMPLATE=NUMBER."""
    with pytest.raises(BadRequest, match="PODFLARE_POOL_TEMPLATES"):
        Config.from_environment({"PODFLARE_POOL_TEMPLATES": text})
