"""A machine's way out: what is in the machine, and what comes out of its other end."""

from __future__ import annotations

import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from machines import DrivenMachine
from podflare.wire.uplink import CALLER_ADDRESS, GATE_ADDRESS, MACHINE_ADDRESS, MTU, Uplink

WAIT_S = 20.0
CA = "-----BEGIN CERTIFICATE-----\nMIIBnotreally\n-----END CERTIFICATE-----\n"

LOOK = """
import os
print(sorted(l.split(":")[0].strip() for l in open("/proc/net/dev").readlines()[2:]))
print(open("/etc/resolv.conf").read().strip())
print(os.environ["HTTPS_PROXY"], os.environ["TOKEN"], os.environ["SSL_CERT_FILE"] == os.environ["PIP_CERT"])
print("MIIBnotreally" in open(os.environ["SSL_CERT_FILE"]).read())
print(open("/proc/net/if_inet6").read().count("eth0"), os.path.exists("/dev/net/tun"), os.path.exists("/tun"))
"""


@pytest.fixture
def linked(new_machine: Callable[..., DrivenMachine]) -> DrivenMachine:
    """A machine with a way out that nobody serves."""
    return new_machine(uplink=Uplink((("TOKEN", "podflare-secret-00ff"),), CA))


def packet_to(machine: DrivenMachine, protocol: int, address: str) -> bytes:
    """The next packet of this protocol to this address that comes out of the machine."""
    ends = machine.machine.uplink
    assert ends is not None
    while select.select([ends.packets], [], [], WAIT_S)[0]:
        packet = os.read(ends.packets, MTU + 100)
        if packet[9] == protocol and packet[16:20] == socket.inet_aton(address):
            assert packet[0] == 0x45 and packet[12:16] == socket.inet_aton(MACHINE_ADDRESS)
            return packet
    raise AssertionError(f"no packet to {address}")


def checksum(data: bytes) -> int:
    """RFC 1071."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def rewritten(packet: bytes, source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """A TCP packet between other ends."""
    head = packet[:10] + b"\0\0" + socket.inet_aton(source[0]) + socket.inet_aton(destination[0])
    head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    segment = struct.pack("!HH", source[1], destination[1]) + packet[24:36] + b"\0\0" + packet[38:]
    padded = segment + b"\0" * (len(segment) % 2)
    pseudo = head[12:20] + struct.pack("!BBH", 0, 6, len(segment))
    return head + segment[:16] + struct.pack("!H", checksum(pseudo + padded)) + segment[18:]


@contextmanager
def connecting(machine: DrivenMachine, address: str, port: int) -> Iterator[None]:
    """A cell in the machine connects to the address meanwhile."""
    machine.start(
        f"import socket\nc = socket.create_connection(({address!r}, {port}), timeout={WAIT_S})\n"
        "c.sendall(b'hello'); print(c.getpeername(), c.recv(10))"
    )
    yield


def test_the_machine_is_told_of_its_way_out_and_its_forks_are_too(linked: DrivenMachine) -> None:
    """There is one interface of IPv4 besides loopback; resolver, proxy, certificate and placeholders are in place."""
    child = linked.fork()[0]
    try:
        for machine in (linked, child):
            out = machine.run(LOOK)
            proxy = f"http://{GATE_ADDRESS}:3128"
            assert out.stdout.splitlines() == [
                "['eth0', 'lo']",
                f"nameserver {GATE_ADDRESS}",
                f"{proxy} podflare-secret-00ff True",
                "True",
                "0 False False",
            ], out.stderr
            in_bash = machine.run("echo $TOKEN $https_proxy", "bash").stdout
            assert in_bash == f"podflare-secret-00ff {proxy}\n"
    finally:
        child.close()


def test_every_packet_comes_out_of_the_descriptor(linked: DrivenMachine) -> None:
    """Datagrams to any address, public or not, are read outside and nowhere else; a fork has a descriptor of its own."""
    code = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
for address in ({addresses}): s.sendto(b"x" * 100, (address, 53))
"""
    addresses = ("192.0.2.7", "169.254.169.254", "10.0.0.1", "224.0.0.1", "255.255.255.255", GATE_ADDRESS)
    child = linked.fork()[0]
    try:
        for machine in (linked, child):
            assert machine.run(code.format(addresses=repr(addresses)[1:-1])).exit.code == 0
            for address in addresses:
                assert packet_to(machine, socket.IPPROTO_UDP, address).endswith(b"x" * 100)
        for machine in (linked, child):
            ends = machine.machine.uplink
            assert ends is not None and not select.select([ends.packets], [], [], 0)[0]
    finally:
        child.close()


def test_what_nobody_reads_is_dropped_early(linked: DrivenMachine) -> None:
    """A machine that sends without end has at most 64 packets in the kernel's memory, and is not held up."""
    out = linked.run("""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(2000): s.sendto(bytes(60000), ("192.0.2.9", 9))
print("sent")
""")
    assert out.stdout == "sent\n"
    ends, count = linked.machine.uplink, 0
    assert ends is not None
    while select.select([ends.packets], [], [], 0)[0]:
        os.read(ends.packets, MTU + 100)
        count += 1
    assert 0 < count <= 64


def test_a_connection_is_ended_by_the_machines_own_kernel(linked: DrivenMachine) -> None:
    """A SYN that is written back with other ends reaches the listener: the bytes then come out of an accepted socket."""
    ends = linked.machine.uplink
    assert ends is not None
    listener = socket.socket(fileno=os.dup(ends.listener))
    with listener, connecting(linked, "192.0.2.80", 80):
        listening = listener.getsockname()
        assert listening[0] == MACHINE_ADDRESS
        port = 0
        while not select.select([listener], [], [], 0)[0]:
            packet = packet_to_any(linked)
            source, destination = struct.unpack("!HH", packet[20:24])
            if packet[16:20] == socket.inet_aton("192.0.2.80"):
                port = source
                os.write(ends.packets, rewritten(packet, (CALLER_ADDRESS, 4711), listening))
            elif packet[16:20] == socket.inet_aton(CALLER_ADDRESS) and destination == 4711:
                os.write(ends.packets, rewritten(packet, ("192.0.2.80", 80), (MACHINE_ADDRESS, port)))
        accepted, peer = listener.accept()
        assert peer == (CALLER_ADDRESS, 4711)
        with accepted:
            accepted.setblocking(False)
            received, sent = b"", False
            while b"hello" not in received or not sent or not select.select([linked.machine.channel], [], [], 0)[0]:
                ready = select.select([ends.packets, accepted, linked.machine.channel], [], [], WAIT_S)[0]
                assert ready
                if accepted in ready:
                    received += accepted.recv(100)
                    if not sent:
                        accepted.sendall(b"and back")
                        sent = True
                if ends.packets in ready:
                    packet = os.read(ends.packets, MTU)
                    destination = struct.unpack("!H", packet[22:24])[0]
                    if destination == 80:
                        os.write(ends.packets, rewritten(packet, (CALLER_ADDRESS, 4711), listening))
                    elif destination == 4711:
                        os.write(ends.packets, rewritten(packet, ("192.0.2.80", 80), (MACHINE_ADDRESS, port)))
    assert linked.finish().stdout == "('192.0.2.80', 80) b'and back'\n"


def packet_to_any(machine: DrivenMachine) -> bytes:
    """The next packet."""
    ends = machine.machine.uplink
    assert ends is not None and select.select([ends.packets], [], [], WAIT_S)[0]
    return os.read(ends.packets, MTU)


def test_a_closed_machine_takes_its_way_out_along(new_machine: Callable[..., DrivenMachine]) -> None:
    """After the end of a machine its descriptors are closed; without a way out there are none, and only loopback."""
    plain = new_machine()
    assert plain.machine.uplink is None
    assert plain.run("print(open('/proc/net/dev').read().count(':'))").stdout == "1\n"
    linked = new_machine(uplink=Uplink())
    ends = linked.machine.uplink
    assert ends is not None
    copy = os.dup(ends.packets)
    try:
        linked.close()
        assert linked.machine.uplink is None
        with pytest.raises(OSError):
            os.fstat(ends.packets)
    finally:
        os.close(copy)


def test_no_packet_takes_another_way(linked: DrivenMachine) -> None:
    """Code in the machine cannot change the interface, make another one, or pose as who the gate lets in."""
    out = linked.run(f"""
import fcntl, os, socket, struct
s = socket.socket()
def refused(what, act):
    try: act(); print("DONE", what)
    except OSError as e: pass
name = b"eth0".ljust(16, b"\\0")
for number in (0x8914, 0x8916, 0x8918, 0x891c, 0x8922, 0x8924, 0x890B, 0x890C, 0x8923, 0x89F0):
    refused(hex(number), lambda: fcntl.ioctl(s, number, name + struct.pack("HH4s", 2, 0, socket.inet_aton("10.9.8.7")) + bytes(100)))
refused("tun", lambda: os.open("/dev/net/tun", os.O_RDWR))
refused("node", lambda: os.mknod("/tmp/tun", 0o600 | 0o020000, os.makedev(10, 200)))
refused("transparent", lambda: s.setsockopt(socket.IPPROTO_IP, 19, 1))
s.setsockopt(socket.IPPROTO_IP, 15, 1)
rows = [line.split() for line in open("/proc/net/tcp").readlines()[1:]]
(listening,) = [int(row[1].partition(":")[2], 16) for row in rows if row[3] == "0A"]
socket.create_connection(({MACHINE_ADDRESS!r}, listening), timeout={WAIT_S}).close()
s.bind(({CALLER_ADDRESS!r}, 4711))
s.settimeout({WAIT_S})
refused("pose", lambda: s.connect(({MACHINE_ADDRESS!r}, listening)))
for fd in os.listdir("/proc/self/fd"):
    try: print("FD", os.readlink("/proc/self/fd/" + fd)) if "tun" in os.readlink("/proc/self/fd/" + fd) else None
    except OSError: pass
print("end")
""")
    assert out.stdout == "end\n", out.stdout
