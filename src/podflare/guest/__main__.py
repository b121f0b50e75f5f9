"""Entry of the bundle: `python -I -S BUNDLE MODE ...`.

Modes: `agent FD [LINE]` serves a host over the inherited socket FD as an ordinary process, without any isolation, LINE
being a socket to its supervisor (guest.supervision);
`zygote ...` is the process engine's (guest.process.zygote); `vm` is process 1 of a virtual machine (guest.vm.init);
`landing FD` and `tap FD NAME OWNER` are the host's part of a virtual machine's network (guest.landing, guest.tap).
"""

from __future__ import annotations

import os
import socket
import sys
from typing import List, NoReturn


def main(argv: List[str]) -> NoReturn:
    """Dispatch by mode; ends the process.  A wrong call exits with status 2 and a line on standard error."""
    if argv[:1] == ["agent"] and len(argv) in (2, 3) and all(word.isdigit() for word in argv[1:]):
        from podflare.guest import agent  # each mode pays for its own imports only

        channel, *line = (socket.socket(fileno=int(word)) for word in argv[1:])
        for sock in (channel, *line):
            sock.set_inheritable(False)
        supervisor = line[0] if line else None
        agent.run(channel, home=os.environ.get("HOME", "/root"), before_repl=lambda: None, supervisor=supervisor)
    if argv[:1] == ["zygote"]:
        from podflare.guest.process import zygote  # each mode pays for its own imports only

        zygote.main(argv[1:])
    if argv == ["vm"]:
        from podflare.guest.vm import init  # each mode pays for its own imports only

        init.main()
    if len(argv) == 2 and argv[0] == "landing" and argv[1].isdigit():
        from podflare.guest import landing  # each mode pays for its own imports only

        landing.main(int(argv[1]))
    if len(argv) == 4 and argv[0] == "tap" and argv[1].isdigit() and argv[3].isdigit():
        from podflare.guest import tap  # each mode pays for its own imports only

        tap.main(int(argv[1]), argv[2], int(argv[3]))
    sys.stderr.write(
        "usage: python -I -S BUNDLE (agent FD [LINE] | zygote ... | vm | landing FD | tap FD NAME OWNER)\n"
    )
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
