"""A program with a private daemon, as users write them: `python -m chaos.embedded NAME`; ends when stdin does.

Whatever is killed below it, it gets the right answer or a PodflareError; and when it is killed itself, nothing of it
stays.
"""

from __future__ import annotations

import json
import select
import sys
import time

from podflare import PodflareError, Sandbox


def say(**words: object) -> None:
    print(json.dumps({"at": time.monotonic(), **words}), flush=True)


def once(name: str, count: int) -> None:
    token = f"{name}-{count}"
    with Sandbox() as sandbox:
        for code in (f"x = {token!r}", "print(x)"):
            done = sandbox.run_code(code, timeout=10)
        if done.stdout not in (token, "") or (done.ok and done.stdout != token):
            say(what="violation", worker=name, text=f"{token} was answered with {done!r}")
        (fork,) = sandbox.fork(1)
        with fork:
            done = fork.run_code("print(x)", timeout=10)
            if done.ok and done.stdout != token:
                say(what="violation", worker=name, text=f"a fork answered {token} with {done!r}")


def main(name: str) -> None:
    count = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        count += 1
        outcome = "ok"
        say(what="begins", worker=name, operation="embedded")
        start = time.monotonic()
        try:
            once(name, count)
        except PodflareError as exc:
            outcome = exc.code
        except Exception as exc:  # noqa: BLE001  # what users must never see
            say(what="violation", worker=name, text=f"the SDK raised {exc!r}")
        took = round(time.monotonic() - start, 3)
        say(what="ends", worker=name, operation="embedded", outcome=outcome, took=took)
    say(what="finished")


if __name__ == "__main__":
    main(*sys.argv[1:])
