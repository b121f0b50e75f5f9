"""Promise: code in a sandbox cannot end, stop or mislead the process that guards it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SIGNALS = {f"signal {number}": f"os.kill(1, {number})" for number in range(1, 65)}
MISLEAD = {
    "debug it to death": "call(101 if X86 else 117, 16, 1, 0, 0); broke('traced')",
    "lower its limits": "import resource\nresource.prlimit(1, resource.RLIMIT_NOFILE, (0, 0)); broke('limited')",
    "end it by its limit on time": "import resource\nresource.prlimit(1, resource.RLIMIT_CPU, (0, 0)); broke('limited')",
    "starve it of memory": "import resource\nresource.prlimit(1, resource.RLIMIT_AS, (0, 0)); broke('limited')",
    "lower its priority": "os.setpriority(os.PRIO_PROCESS, 1, 19)",
    "put it to sleep by a scheduler": "os.sched_setscheduler(1, os.SCHED_IDLE, os.sched_param(0))",
    "have it killed first when memory ends": "os.write(os.open('/proc/1/oom_score_adj', os.O_WRONLY), b'1000'); broke('oom')",
    "orphans without end": "for _ in range(100):\n    if not os.fork():\n        if not os.fork(): os._exit(0)\n        os._exit(0)\n    try: os.waitpid(-1, os.WNOHANG)\n    except OSError: pass",
    "zombies for it to reap": "pids = []\ntry:\n    for _ in range(60):\n        if not os.fork():\n            os.setsid(); os._exit(0)\nexcept OSError: pass",
    "a name that breaks its look at processes": "libc.prctl(15, b') R 1 1 (\\n', 0, 0, 0)\nif not os.fork(): time.sleep(0.2); os._exit(0)",
    "its directory removed": "subprocess.run('rm -rf /root /tmp /home /etc /var 2>/dev/null; mkdir /root /tmp', shell=True)",
    "its shell replaced": "os.rename('/usr/bin/bash', '/usr/bin/bash.was'); os.rename('/usr/bin/bash.was', '/usr/bin/bash')",
    "its modules replaced": "[os.makedirs(p, exist_ok=True) or open(p + '/os.py', 'w').write('raise SystemExit') for p in ('/root', '/tmp')]",
}  # fmt: skip


@pytest.mark.both_engines
def test_signals_one_after_the_other(attacker):
    """Pid 1 of the sandbox cannot be ended or stopped from inside, on either engine."""
    attacker.run("""
import os
for number in range(1, 65):
    try: os.kill(1, number)
    except OSError: pass
""")
    assert attacker.run("print('still here')").stdout == "still here\n"


@pytest.mark.any_engine
def test_the_agent_survives_every_signal(attempt, attacker):
    """Pid 1 of the sandbox cannot be ended or stopped from inside by any signal, and goes on to serve."""
    attempt(SIGNALS)
    assert attacker.run("echo still here", "bash").stdout == "still here\n"


def test_the_agent_goes_on(attempt, attacker):
    """What is done to its priority, children, directory and files does not keep the agent from serving either language."""
    attempt(MISLEAD)
    assert attacker.run("echo still here", "bash").stdout == "still here\n"
    status = Path(f"/proc/{attacker.host_pid}/stat").read_text().rpartition(")")[2].split()[0]
    assert status in "SR"


LIES = {
    "garbage": "os.write(fd, os.urandom(64))",
    "an endless length": "os.write(fd, struct.pack('>IBI', 2**32 - 1, 1, 1))",
    "another's result": "os.write(fd, frame({'op': 'exit', 'code': 0, 'reason': 'ended', 'restarted': False, 'signal': 0}, 999))",
    "an end before the end": "os.write(fd, frame({'op': 'exit', 'code': 42, 'reason': 'ended', 'restarted': False, 'signal': 0}, CHANNEL))",
    "a greeting in between": "os.write(fd, frame({'op': 'ready', 'protocol': 1, 'python': 'x'}, 0))",
    "the host's message": "os.write(fd, frame({'op': 'exec', 'code': '1', 'language': 'bash', 'name': 'x'}, CHANNEL))",
    "a file it was not asked for": "os.write(fd, frame({'op': 'file_opened', 'size': 9}, CHANNEL))",
    "bytes of a file": "os.write(fd, struct.pack('>IBI', 1, 4, CHANNEL) + b'x')",
    "deep JSON": "os.write(fd, raw(b'[' * 60000, CHANNEL))",
    "a million keys": "os.write(fd, raw(json.dumps({str(n): 0 for n in range(300000)}).encode(), CHANNEL)[:4 << 20])",
    "names of a megabyte": "os.write(fd, frame({'op': 'result', 'data': {'x' * (1 << 20): 'y'}, 'kind': 'value'}, CHANNEL))",
    "cut in the middle": "os.write(fd, frame({'op': 'exit'}, CHANNEL)[:7])",
    "an endless message": "data = raw(b' ' * (1 << 20), CHANNEL)\nfor _ in range(64): os.write(fd, data)",
    "descriptors": "socket.socket(fileno=os.dup(fd)).sendmsg([b'x'], [(1, 1, array.array('i', [0] * 253))])",
}  # fmt: skip
_FORGE = """
import array, json, os, socket, struct, sys
def raw(body, channel): return struct.pack(">IBI", len(body), 1, channel) + body
def frame(message, channel): return raw(json.dumps(message).encode(), channel)
frame_ = sys._getframe()
sockets = []
for name in os.listdir("/proc/self/fd"):
    fd = int(name)
    try: kind = socket.socket(fileno=os.dup(fd)).getsockopt(1, 3)
    except OSError: continue
    if kind == 1: sockets.append(fd)
"""


@pytest.mark.any_engine
def test_a_repl_that_lies_to_its_agent_is_replaced(new_machine, record):
    """Whatever the REPL writes to its agent ends at most that REPL: the cell ends, and the next one runs in a machine that lives."""
    machine = new_machine()
    found = {}
    for name, lie in LIES.items():
        channel = machine._channel + 1
        told = machine.run(f"{_FORGE}CHANNEL = {channel}\nfor fd in sockets: exec({lie!r})", timeout_s=20)
        if told.exit.reason not in ("ended", "died"):
            found[name] = f"broke: {told}"
            continue
        machine.run("pass")
        well = machine.run("print(1 + 1)").stdout == "2\n" and machine.run("echo 3", "bash").stdout == "3\n"
        found[name] = "held" if well else "broke: the machine does not go on"
    record(found)
    with open(f"/proc/{machine.host_pid}/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert peak < (1024 if "hypervisor" in machine.machine.walls else 128) * 1024
    assert os.path.exists(f"/proc/{machine.host_pid}")
