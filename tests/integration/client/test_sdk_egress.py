"""The network of sandboxes through the SDK, as far as it needs no network: what is asked, told, inherited, refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from daemons import ServedDaemon
from podflare import BadRequest, Sandbox, Secret

VALUE = "sk-real-value-4711"


def test_what_was_asked_for_is_told_and_inherited(sdk_daemon: ServedDaemon) -> None:
    """The effective reach and secrets are told, a fork has the same and the same placeholders; values are nowhere."""
    with Sandbox(
        host=sdk_daemon.url,
        egress=["*.example.org", "db.example.com:5432"],
        secrets={"TOKEN": Secret(VALUE, hosts=["api.example.com"])},
    ) as sandbox:
        info = sandbox.info()
        assert (info.egress, info.secrets) == (
            ("*.example.org", "db.example.com:5432"),
            {"TOKEN": ("api.example.com",)},
        )
        placeholder = sandbox.run_code("import os; print(os.environ['TOKEN'])").stdout
        assert placeholder.startswith("podflare-secret-") and len(placeholder) > 40
        (child,) = sandbox.fork()
        with child:
            assert child.info().egress == info.egress and child.info().secrets == info.secrets
            assert child.run_code("echo $TOKEN", "bash").stdout == placeholder
            sandbox.merge_into(child)
            assert sandbox.info().secrets == info.secrets
        log = sandbox.egress_log()
        assert (log.egress, log.secrets, log.entries, log.dropped) == (info.egress, info.secrets, (), 0)
        everywhere = sandbox.run_code(f"grep -rlsF {VALUE} /etc /root /proc/[0-9]*/environ | wc -l", "bash").stdout
        assert everywhere == "0"
    assert VALUE not in repr(Secret(VALUE, hosts=["a.example"]))


def test_without_a_word_there_is_no_network(sdk_daemon: ServedDaemon) -> None:
    """Neither not asking nor egress=False gives an interface; the log of such a sandbox is empty."""
    for egress in (None, False):
        with Sandbox(host=sdk_daemon.url, egress=egress) as sandbox:
            assert sandbox.run_code("print(open('/proc/net/dev').read().count(':'))").stdout == "1"
            log = sandbox.egress_log()
            assert (sandbox.info().egress, log.egress, log.entries) == (False, False, ())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"egress": "api.example.com"}, "list of names"),
        ({"egress": ["a b"]}, "not a host"),
        ({"egress": ["127.0.0.1"]}, "loopback"),
        ({"egress": ["192.168.1.1"]}, "PODFLARE_EGRESS_PRIVATE"),
        ({"secrets": {"A": VALUE}}, "Secret"),
        ({"secrets": {"A": Secret(VALUE, hosts="a.example")}}, "list"),
        ({"secrets": {"A": Secret(VALUE + "\n", hosts=["a.example"])}}, "printable"),
        ({"secrets": {"A": Secret(VALUE, hosts=["*"])}}, "host"),
        ({"egress": False, "secrets": {"A": Secret(VALUE, hosts=["a.example"])}}, "secrets"),
    ],
)
def test_what_cannot_be_is_refused_in_words(sdk_daemon: ServedDaemon, options: dict, words: str) -> None:
    """A wrong entry is a BadRequest that says what is wrong and never shows a value."""
    with pytest.raises(BadRequest, match=words) as caught:
        Sandbox(host=sdk_daemon.url, **options)
    assert VALUE not in str(caught.value)


def test_names_that_a_secret_cannot_have(sdk_daemon: ServedDaemon) -> None:
    """No variable of a sandbox's own, and none that programs obey as they start, can hold a placeholder."""
    secret = Secret(VALUE, hosts=["a.example"])
    with Sandbox(host=sdk_daemon.url, secrets={"PYTHON_TOKEN": secret}) as sandbox:
        own = sandbox.run_code("import os; print(*os.environ)").stdout.split()
    own.remove("PYTHON_TOKEN")
    assert {"PATH", "HOME", "HTTP_PROXY", "SSL_CERT_FILE"} <= set(own)
    for name in (*own, "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "BASH_ENV", "all_proxy"):
        with pytest.raises(BadRequest, match=f"the variable {name} .*take another name"):
            Sandbox(host=sdk_daemon.url, secrets={name: secret})


def test_the_published_clients_flag(sdk_daemon: ServedDaemon) -> None:
    """`egress=True` gives the one interface and a name server."""
    with Sandbox(host=sdk_daemon.url, egress=True) as sandbox:
        assert sandbox.info().egress is True
        assert "nameserver" in sandbox.run_code("print(open('/etc/resolv.conf').read())").stdout


def test_the_command_line(sdk_daemon: ServedDaemon, tmp_path: Path) -> None:
    """`run --allow` gives a network to one program, `egress` tells of a sandbox's; both options at once are wrong."""

    def podflare(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "podflare", *words, "--host", sdk_daemon.url]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    code = "print(open('/proc/net/dev').read().count(':'))"
    assert podflare("run", "-c", code, "--allow", "api.example.com").stdout == "2\n"
    assert podflare("run", "-c", code).stdout == "1\n"
    assert podflare("run", "-c", code, "--egress", "--allow", "a.example").returncode == 2
    with Sandbox(host=sdk_daemon.url, secrets={"A": Secret(VALUE, hosts=["api.example.com"])}) as sandbox:
        shown = podflare("egress", sandbox.id).stdout
        assert "may reach: hosts of secrets" in shown and "secret A: for api.example.com" in shown
