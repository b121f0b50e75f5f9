"""`make chaos`: daemons under load whose processes are killed and stopped at random, and what must be true meanwhile.

What it asserts is in CONTRIBUTING.md.  Events and operations are drawn from the seed; when they meet is the machine's.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from chaos.engines import ENGINES
from chaos.judge import Judge
from chaos.stand import Stand


def main() -> int:
    parser = argparse.ArgumentParser(prog="chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600, help="of load; the looks at what is left come on top")
    parser.add_argument("--seed", type=int, default=None, help="printed; the same again draws the same events")
    parser.add_argument("--engine", choices=sorted(ENGINES), default="process")
    parser.add_argument("--image-dir", type=Path, help="with microvm: of images, where the default one is built first")
    parser.add_argument("--clients", type=int, default=3, help="processes, of two threads each")
    parser.add_argument("--round", type=float, default=12, help="seconds between two looks at what is left")
    parser.add_argument("--restart-limit", type=float, default=2.0, help="seconds that a daemon may take to start")
    parser.add_argument("--history", help="write everything that happened to this file")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    judge = Judge()
    draw = random.Random(seed)
    left = given.seconds
    with tempfile.TemporaryDirectory(prefix="pfc-") as folder:
        Path(folder).chmod(0o711)  # a machine of a root daemon enters with another id
        with Stand(Path(folder), judge, draw, given.restart_limit, ENGINES[given.engine], given.image_dir) as stand:
            number = 0
            while left > 0 and not judge.violations:
                judge.calm = number == 0
                seconds = min(given.round / (1 if number else 4), left)
                stand.round(number, seconds, given.clients)
                left -= seconds
                print(f"round {number}: {stand.words()}", flush=True)
                number += 1
            log = stand.log()
    if given.history:
        Path(given.history).write_text("\n".join(judge.history) + "\n")
    print(judge.report())
    print(stand.report())
    for violation in judge.violations[:3]:
        print(f"\nVIOLATION {violation}\nlog of the daemon:\n{log}", file=sys.stderr)
    return 1 if judge.violations else 0


if __name__ == "__main__":
    sys.exit(main())
