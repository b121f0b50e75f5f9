"""Promise: a machine that is copied as a whole goes on with its new host, and its variables know of the fork."""

from __future__ import annotations

import json
import select
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from guest_driver import Guest
from hypothesis import given
from hypothesis import strategies as st

from podflare.guest.link import TokenSearch
from podflare.wire import frames
from podflare.wire.messages import Exec, FileWrite, from_guest, to_payload
from podflare.wire.variables import VariablesSurvey, VariablesTable

TIMEOUT_S = 30


class Supervisor:
    """Init's end of the line to its agent."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def order(self, body: dict[str, Any], fds: tuple[int, ...] = ()) -> dict[str, Any]:
        socket.send_fds(self.sock, [json.dumps(body).encode()], fds)
        assert select.select([self.sock], [], [], TIMEOUT_S)[0]
        answer: dict[str, Any] = json.loads(self.sock.recv(4096))
        return answer

    def renew(
        self, guest: Guest, *, reseed: bool = True, token: bytes = b"", stale: bytes = b"", **more: Any
    ) -> dict[str, Any]:
        """Give the guest a new channel, which the driver then speaks over.

        Args:
            stale: what lies in it from before, with `token` behind it.
            more: of the order.
        """
        ours, theirs = socket.socketpair()
        ours.sendall(stale + token)
        with theirs:
            answer = self.order({"renew": {"reseed": reseed, "token": token.hex(), **more}}, (theirs.fileno(),))
        guest.move_to(ours)
        return answer


@pytest.fixture
def supervised(start_guest: Callable[..., Guest]) -> Iterator[tuple[Guest, Supervisor]]:
    """A guest that waits for its first cell, and who copies its machine."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    guest = start_guest(supervisor=theirs)
    guest.wait_ready()
    with ours:
        yield guest, Supervisor(ours)


def test_a_new_channel(supervised):
    """Over a new channel the guest says Ready and goes on with its variables; what the old one held is forgotten."""
    guest, supervisor = supervised
    assert guest.run("x = 41").exit.code == 0
    old = guest.sock.dup()
    channel = guest.new_channel()
    guest.send(channel, FileWrite(path="half"))
    guest.send_frame(frames.DATA, channel, b"a part")
    guest.next_frame(channel)
    whole = frames.encode(frames.MESSAGE, guest.new_channel(), to_payload(Exec(code="x = 0")))
    guest.sock.sendall(whole[: len(whole) // 2])
    assert supervisor.renew(guest) == {"renewed": True}
    guest.wait_ready()
    with old:
        assert old.recv(1) == b""
    assert guest.run("x + 1").value == "42"
    assert guest.run("import os; os.listdir()").value == "[]"


def test_variables_of_the_environment(supervised):
    """What a copy is told to have in its environment is there for its REPL, its programs and a later REPL, too."""
    guest, supervisor = supervised
    many = {f"TOKEN_{number}": "podflare-secret-" + "0" * 32 for number in range(100)}
    assert supervisor.renew(guest, environment={"PROXY": "http://gate", **many}) == {"renewed": True}
    guest.wait_ready()
    look = "import os; [os.environ['PROXY'], len([name for name in os.environ if name.startswith('TOKEN_')])]"
    assert guest.run(look).value == "['http://gate', 100]"
    assert guest.run("echo $PROXY $TOKEN_99", "bash").stdout == f"http://gate {many['TOKEN_99']}\n".encode()
    guest.run("os.kill(os.getpid(), 9)")
    assert guest.run(look).value == "['http://gate', 100]"


def test_what_was_under_way_is_dropped(supervised):
    """Of a channel with a past both sides drop what comes before the token, however it is cut."""
    guest, supervisor = supervised
    token = bytes(range(100, 132))
    half = frames.encode(frames.MESSAGE, 7, to_payload(Exec(code="x = 0")))[:20]
    assert supervisor.renew(guest, token=token, stale=half + token[:-1]) == {"renewed": True}
    assert guest.sock.recv(len(token), socket.MSG_WAITALL) == token
    guest.wait_ready()
    assert guest.run("'x' in globals()").value == "False"


def test_the_host_may_go_away(supervised):
    """Without its host a supervised guest waits for another one, and ends with its supervisor."""
    guest, supervisor = supervised
    guest.run("x = 41")
    guest.sock.close()
    assert supervisor.renew(guest) == {"renewed": True}
    guest.wait_ready()
    assert guest.run("x").value == "41"
    guest.sock.close()
    supervisor.sock.close()
    guest.process.wait(TIMEOUT_S)


@given(st.binary(max_size=40), st.binary(max_size=20), st.lists(st.integers(1, 9), max_size=30))
def test_a_token_is_found_however_the_stream_is_cut(before: bytes, after: bytes, cuts: list[int]) -> None:
    """What follows a token is kept whole, wherever pieces end."""
    token, stream = b"\xff" * 4, before.replace(b"\xff", b"\xfe") + b"\xff" * 4 + after
    search, rest, at = TokenSearch(token), None, 0
    for size in [*cuts, len(stream)]:
        piece, at = stream[at : at + size], at + size
        if rest is None:
            rest = search.feed(piece)
        else:
            rest += piece
    assert rest == after


def test_a_copy_draws_other_numbers(supervised):
    """A copy's global generators are seeded anew, unless they are to be kept."""
    guest, supervisor = supervised
    guest.run("import random; random.seed(1); state = random.getstate()")
    assert supervisor.renew(guest, reseed=False) == {"renewed": True}
    guest.wait_ready()
    assert guest.run("random.getstate() == state").value == "True"
    assert supervisor.renew(guest) == {"renewed": True}
    guest.wait_ready()
    assert guest.run("random.getstate() == state").value == "False"


def test_the_moment_of_a_copy_is_a_base(supervised):
    """The moment before a copy is a base of the variables, which is not the present state once a cell ran."""
    guest, supervisor = supervised
    guest.run("x = 1")
    assert supervisor.order({"mark": True}) == {"marked": True}
    first = survey(guest)
    assert len(first.bases) == 1
    assert first.present == first.bases
    guest.run("x = 2")
    second = survey(guest)
    assert (second.bases, second.present) == (first.bases, ())


def test_no_copy_while_a_cell_runs(supervised):
    """The supervisor is refused while a cell runs, and again served after it; a REPL that died is no obstacle."""
    guest, supervisor = supervised
    channel = guest.start("print('on', flush=True); input_fd = __import__('time').sleep(600)")
    guest.next_frame(channel)
    assert supervisor.order({"mark": True}) == {"failed": "a cell runs"}
    guest.interrupt(channel)
    guest.finish(channel)
    guest.run("import os; os._exit(3)")
    assert supervisor.order({"mark": True}) == {"marked": True}


def survey(guest: Guest) -> VariablesTable:
    channel = guest.new_channel()
    guest.send(channel, VariablesSurvey(budget_ms=1000))
    table = from_guest(guest.next_frame(channel).payload)
    assert isinstance(table, VariablesTable)
    guest.next_frame(channel)
    return table
