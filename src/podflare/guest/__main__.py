"""Entry of the bundle: `python -I -S BUNDLE MODE ...`.

Modes: `agent FD` serves a host over the inherited socket FD as an ordinary process, without any isolation;
`zygote ...` is the process engine's (guest.process.zygote).
"""

from __future__ import annotations

import os
import socket
import sys
from typing import List, NoReturn


def main(argv: List[str]) -> NoReturn:
    """Dispatch by mode; ends the process.  A wrong call exits with status 2 and a line on standard error."""
    if argv[:1] == ["agent"] and len(argv) == 2 and argv[1].isdigit():
        from podflare.guest import agent  # each mode pays for its own imports only

        channel = socket.socket(fileno=int(argv[1]))
        channel.set_inheritable(False)
        agent.run(channel, home=os.environ.get("HOME", "/root"), before_repl=lambda: None)
    if argv[:1] == ["zygote"]:
        from podflare.guest.process import zygote  # each mode pays for its own imports only

        zygote.main(argv[1:])
    sys.stderr.write("usage: python -I -S BUNDLE (agent FD | zygote ...)\n")
    sys.exit(2)


if __name__ == "__main__":
    main(sys.argv[1:])
