"""How connections through the gate behave: ends, failures, crowds, hostile packets, and the gate's own death."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import anyio

import worlds
from podflare.egress.flows import MAX_LIVE
from podflare.egress.keeper import GateKeeper, GateSettings
from podflare.egress.policy import Policy
from podflare.errors import EgressUnavailable

MIB = 1024 * 1024


def test_ends_and_failures_are_told_as_they_are(network):
    """Half-closed connections go on the other way, resets are resets, refusals refusals, and all of it arrives."""
    sandbox = network(True)
    told = sandbox.run(
        """
def half():
    with socket.create_connection((WEB, 7006), timeout=20) as sock:
        for _ in range(32):
            sock.sendall(bytes(1 << 20))
        sock.shutdown(socket.SHUT_WR)
        return sock.makefile().read()
def download():
    with socket.create_connection((WEB, 7003), timeout=20) as sock:
        sock.sendall(b"%d\\n" % (64 << 20))
        size = 0
        while data := sock.recv(1 << 20):
            size += len(data)
        return size
def reset():
    with socket.create_connection((WEB, 7004), timeout=20) as sock:
        sock.sendall(b"x")
        return sock.recv(1)
def leave():
    import struct
    sock = socket.create_connection((WEB, 7002), timeout=20)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.recv(1)
    sock.close()
def listener():
    # The gate's own way in, found by looking for it: nothing is behind it.
    ports = [int(line.split()[1].split(":")[1], 16) for line in open("/proc/net/tcp") if " 0A " in line]
    found = []
    for port in ports:
        with socket.create_connection(("198.18.0.2", port), timeout=5) as sock:
            found.append(sock.recv(1).decode())
    return found
tell({"half": half(), "download": download(), "reset": attempt(reset), "closed": attempt(connect, WEB, 1),
      "listener": listener(), "leave": leave(), "again": talk((WEB, 7000), b"x", until=b"x")})""",
        WEB=worlds.WEB,
    )
    assert told["half"] == str(32 * MIB) and told["download"] == 64 * MIB
    assert "reset by peer" in told["reset"][0] and "Connection refused" in told["closed"][0]
    assert told["listener"] == [""] and told["again"] == "x"
    upload = next(entry for entry in sandbox.journal() if entry.port == 7006)
    assert (upload.bytes_out, upload.bytes_in) == (32 * MIB, len(str(32 * MIB)))


def test_a_crowd_of_connections_is_bounded(network):
    """A sandbox has so many connections at a time and no more; those beyond are refused at once, and the others work."""
    sandbox = network(True)
    other = network(True)
    told = sandbox.run(
        """
socks, refused = [], 0
for _ in range(MOST + 20):
    try:
        socks.append(socket.create_connection((WEB, 7000), timeout=8))
    except ConnectionRefusedError:
        refused += 1
answers = 0
for sock in socks:
    sock.sendall(b"x")
    answers += sock.recv(1) == b"x"
for sock in socks:
    sock.close()
deadline = time.monotonic() + 10
while True:  # the ends arrive one by one
    try:
        last = talk((WEB, 7000), b"y", until=b"y")
        break
    except ConnectionRefusedError:
        assert time.monotonic() < deadline
tell([len(socks), refused, answers, last])""",
        WEB=worlds.WEB,
        MOST=MAX_LIVE,
    )
    assert told == [MAX_LIVE, 20, MAX_LIVE, "y"]
    assert any("more than" in entry.reason for entry in sandbox.journal())
    assert other.run('tell(fetch("http://api.example.com/echo")[0])') == 200


def test_who_does_not_read_costs_little(network, keeper):
    """Programs that read nothing of endless answers hold a bounded part of the gate's memory, and nobody else up."""
    sandbox = network(True)
    before = _memory(keeper.gate_pid)
    told = sandbox.run(
        """
socks = [socket.create_connection((WEB, 7002), timeout=8) for _ in range(100)]
deadline = time.monotonic() + 1.0
rounds = 0
while time.monotonic() < deadline:
    assert talk((WEB, 7000), b"x", until=b"x") == "x"
    rounds += 1
tell(rounds)""",
        WEB=worlds.WEB,
    )
    assert told > 10
    assert _memory(keeper.gate_pid) - before < 64 * MIB


def test_hostile_packets(network, keeper):
    """Truncated, lying, spoofed and random packets, and floods of new connections, leave gate and neighbours unharmed."""
    sandbox = network(True)
    other = network(True)
    pid = keeper.gate_pid
    told = sandbox.run(
        """
import random, struct
random.seed(5)
raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
def ip(protocol, content, source="198.18.0.2", target=WEB, first=0x45, length=None, fragment=0):
    return struct.pack(">BBHHHBBH4s4s", first, 0, length or 20 + len(content), 1, fragment, 64, protocol, 0,
                       socket.inet_aton(source), socket.inet_aton(target)) + content
def tcp(flags, source=1000, port=80, offset=5, seq=1, ack=0):
    return struct.pack(">HHIIBBHHH", source, port, seq, ack, offset << 4, flags, 1000, 0, 0)
sent = 0
def send(packet, target=WEB):
    global sent
    try:
        raw.sendto(packet, (target, 0))
        sent += 1
    except OSError:
        pass
for flags in range(256):
    for target in (WEB, "198.18.0.1", "198.18.0.3", "198.18.5.5", "127.0.0.1", "255.255.255.255"):
        send(ip(6, tcp(flags), target=target), target)
for offset in range(16):
    send(ip(6, tcp(2, offset=offset)))
for size in range(0, 30):
    for protocol in (1, 6, 17, 99):
        send(ip(protocol, bytes(size)))
send(ip(6, tcp(2), source=WEB))
send(ip(6, tcp(2), source="198.18.0.3"))
send(ip(6, tcp(2), fragment=0x2000))
send(ip(6, tcp(2), fragment=0x0001))
send(ip(17, struct.pack(">HHHH", 9, 53, 65535, 0) + b"x" * 20))
for _ in range(3000):
    send(ip(random.choice((1, 6, 17)), random.randbytes(random.randrange(8, 80))))
for number in range(3000):
    send(ip(6, tcp(2, source=1024 + number, port=7001, seq=number)))
tell(sent)""",
        WEB=worlds.WEB,
    )
    assert told > 5000
    assert other.run('tell(fetch("http://api.example.com/echo")[0])') == 200
    assert keeper.gate_pid == pid
    assert len(sandbox.journal()) <= 1000
    assert _memory(pid) < 200 * MIB


def test_a_killed_gate_is_replaced(own_network, own_keeper):
    """When the gate is killed open connections fail at once, nothing hangs, and soon everything is reached again."""
    sandbox = own_network(["api.example.com", "other.example.com:7000"])
    folder = Path(sandbox.trusted).parent
    program = """
import threading
socks = [socket.create_connection(("other.example.com", 7000), timeout=30) for _ in range(50)]
ends = []
def wait(sock):
    start = time.monotonic()
    try:
        ends.append(repr(sock.recv(1)))
    except OSError as error:
        ends.append(type(error).__name__)
threads = [threading.Thread(target=wait, args=(sock,)) for sock in socks]
for thread in threads:
    thread.start()
open(FOLDER + "/waiting", "w").close()
for thread in threads:
    thread.join()
tell([sorted(set(ends)), len(ends), fetch("http://api.example.com/echo")[0]])"""
    killer = _Killer(folder / "waiting", own_keeper)
    killer.start()
    told = sandbox.run(program, FOLDER=str(folder))
    killer.join()
    assert told == [["ConnectionResetError"], 50, 200]
    assert own_keeper.gate_pid not in (None, killer.killed)
    assert "gate" in [entry.protocol for entry in sandbox.journal()]


def test_an_order_that_finds_the_gate_dead_goes_to_the_next_one(own_network, own_keeper, portal):
    """Whoever speaks to a gate before its death was seen gets an answer from the next, and holds nobody else up."""
    sandbox = own_network(["api.example.com"])
    inside = worlds.Inside(Path(sandbox.trusted).parent, ca_pem=sandbox.trusted.read_bytes())

    async def after_a_death(order, *given):
        pidfd = os.pidfd_open(own_keeper.gate_pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], 20)  # nothing else runs in this loop meanwhile
        os.close(pidfd)
        return await order(*given)

    entries, _ = portal.call(after_a_death, own_keeper.journal, sandbox.key)
    assert {entry.protocol for entry in entries} == {"gate"}
    portal.call(after_a_death, own_keeper.branch, "fork", sandbox.key, inside.tun, inside.listener)
    portal.call(after_a_death, own_keeper.detach, "fork")
    inside.close()
    assert {entry.protocol for entry in sandbox.journal()} == {"gate"}  # of a new gate
    assert sandbox.run('tell(fetch("http://api.example.com/echo")[0])') == 200


def test_a_gate_that_hangs_is_replaced(portal, world, settings):
    """A gate that answers no more is ended and replaced, though nobody asks it; an interrupt, as of a terminal, ends none."""

    async def scenario() -> list[str]:
        keeper = GateKeeper(replace(settings, answer_timeout_s=5.0, look_every_s=0.5))
        told = []
        try:
            await keeper.prepare("one", Policy.parse(["api.example.com"]), {})
            await keeper.attach("one", inside.tun, inside.listener)
            first = keeper.gate_pid
            pidfd = os.pidfd_open(first)
            os.kill(first, signal.SIGINT)
            await keeper.journal("one")
            told.append("same" if keeper.gate_pid == first else "other")
            os.kill(first, signal.SIGSTOP)
            with anyio.fail_after(30):
                await anyio.wait_readable(pidfd)
            told.append((await keeper.journal("one"))[0][0].protocol)
            told.append("same" if keeper.gate_pid == first else "other")
            os.close(pidfd)
        finally:
            await keeper.aclose()
        return told

    inside = worlds.Inside(world.ca_file.parent)
    try:
        assert portal.call(scenario) == ["same", "gate", "other"]
    finally:
        inside.close()


def test_the_gate_has_no_privileges(keeper):
    """It has no capability, cannot get one or start a program, knows nothing of the daemon's environment, and is not root."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{keeper.gate_pid}/status").read_text().splitlines())
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    assert (
        "0" not in status["Uid"].split()
        and "0" not in status["Gid"].split()
        and status["Groups"].split() in ([], [str(os.getgid())])
    )
    limits = Path(f"/proc/{keeper.gate_pid}/limits").read_text()
    assert next(line for line in limits.splitlines() if line.startswith("Max core file")).split()[4] == "0"
    if os.getuid() == 0:
        names = {entry.partition("=")[0] for entry in Path(f"/proc/{keeper.gate_pid}/environ").read_text().split("\0")}
        assert names <= {"PATH", "PYTHONPATH", "PYTHONHOME", "LANG", "LC_CTYPE", ""}


def test_a_gate_that_cannot_start_is_an_error(portal, world):
    """What cannot be started, dies at once or says nothing is told as an error within its time, and leaves nothing."""
    inside = worlds.Inside(world.ca_file.parent)
    for command in (("/does/not/exist",), (sys.executable, "-c", "pass")):

        async def attach(command: tuple[str, ...] = command) -> str:
            keeper = GateKeeper(GateSettings(command=command))
            await keeper.prepare("one", Policy.parse(True), {})
            try:
                await keeper.attach("one", inside.tun, inside.listener)
            except EgressUnavailable as error:
                return str(error)
            finally:
                await keeper.aclose()
            return "attached"

        assert "gate" in portal.call(attach)
    inside.close()


class _Killer:
    """Kills the gate once a file is there."""

    def __init__(self, sign: Path, keeper) -> None:
        self._sign, self._keeper = sign, keeper
        self._thread = threading.Thread(target=self._run)
        self.killed: int | None = None

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        deadline = time.monotonic() + 30
        while not self._sign.exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)  # a file of another process: no event
        self.killed = self._keeper.gate_pid
        os.kill(self.killed, signal.SIGKILL)

    def join(self) -> None:
        self._thread.join(30)


def _memory(pid: int) -> int:
    """Resident bytes of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
