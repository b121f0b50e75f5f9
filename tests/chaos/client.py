"""One client process: threads that use sandboxes of their own in every way, and check every answer against the model.

`python -m chaos.client UDS NAME SEED THREADS ENGINE`.  Says what it does as JSON lines on stdout; ends when stdin does,
having checked and closed every sandbox.  It may be killed at any moment.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from chaos import processes as p
from chaos.calls import Answer, Caller, Cut, Violation
from chaos.engines import ENGINES, Engine
from chaos.model import CELL, Known, Wrong

MAX_HELD = 4
CREATE_S, CELL_S, FORK_S, MERGE_S, DIFF_S, SWITCH_S, CLOSE_S, FILE_S = 25.0, 4.0, 15.0, 20.0, 25.0, 28.0, 20.0, 30.0
CELL_END_S = 2.0 + 5.0
"""From the deadline of a cell to its end, whatever the sandbox does (docs/http-api.md)."""
BACK_S = 30.0
"""A daemon that ended is started again within this."""
FILE = "/root/data"
_saying = threading.Lock()


def say(**words: Any) -> None:
    with _saying:
        print(json.dumps({"at": time.monotonic(), **words}), flush=True)


class Worker:
    """One thread with its sandboxes."""

    def __init__(self, uds: str, name: str, seed: int, engine: Engine) -> None:
        self._engine = engine
        self._caller = Caller(uds)
        self._name = name
        self._draw = random.Random(seed)
        self._held: dict[str, Known] = {}
        self._count = 0
        self.stop = threading.Event()

    def run(self) -> None:
        """Until told to stop; then check and close everything."""
        try:
            while not self.stop.is_set():
                self._step(self._draw.choices(_OPERATIONS, _WEIGHTS)[0])
            for known in list(self._held.values()):
                self._step(Worker._token, known)
                self._step(Worker._download, known)
            for known in list(self._held.values()):
                self._step(Worker._close, known)
        except (Violation, Wrong) as exc:
            say(what="violation", worker=self._name, text=f"{type(exc).__name__}: {exc}")
        except Exception as exc:  # noqa: BLE001  # a bug of this program is told like any other violation
            say(what="violation", worker=self._name, text=f"the client itself: {exc!r}")
        finally:
            self._caller.close()

    def _step(self, operation: Callable[..., None], *args: Any) -> None:
        start = time.monotonic()
        say(what="begins", worker=self._name, operation=operation.__name__)
        outcome = "ok"
        try:
            operation(self, *args)
        except Cut as exc:
            outcome = "cut"
            say(what="cut", worker=self._name, since=start, text=str(exc))
            self._await_daemon()
        except _Refused as exc:
            outcome = exc.code
        took = round(time.monotonic() - start, 3)
        say(what="ends", worker=self._name, operation=operation.__name__, outcome=outcome, took=took)

    def _await_daemon(self) -> None:
        """After a cut: until it answers again, then see which sandboxes are left."""
        deadline = time.monotonic() + BACK_S
        while True:
            try:
                self._caller.call("GET", "/v1/healthz")
                break
            except Cut:
                if time.monotonic() > deadline:
                    raise Violation(f"the daemon does not answer for {BACK_S:g} s") from None
                time.sleep(0.05)  # it is being started
        for known in list(self._held.values()):
            self._look(known)

    def _call(self, known: Known | None, method: str, path: str, body: Any = None, *, limit_s: float = 1.0) -> Answer:
        """Raises: _Refused for an error; the sandbox is then looked at, and forgotten if it is gone."""
        answer = self._caller.call(method, path, body, limit_s=limit_s)
        if not answer.ok:
            if known is not None and answer.code != "file_missing":
                self._look(known)
            say(what="error", worker=self._name, code=answer.code, text=answer.json()["error"][:300])
            raise _Refused(answer.code)
        return answer

    def _look(self, known: Known) -> None:
        """Whether it lives.  If not: it must say why, be known as closed, and be gone for good."""
        path = f"/v1/sandboxes/{known.id}"
        answer = self._caller.call("GET", path)
        if answer.ok:
            return
        text = str(answer.json()["error"])
        if answer.code != "sandbox_not_found" or "is gone: " not in text:
            raise Violation(f"{known.id} is lost without a cause: {answer.status} {text}")
        if self._caller.call("DELETE", path, limit_s=CLOSE_S).status != 204:
            raise Violation(f"{known.id} was issued and cannot be closed")
        self._held.pop(known.id, None)
        say(what="dead", worker=self._name, id=known.id, born=known.born, since=known.since, cause=text)

    def _pick(self) -> Known:
        if not self._held:
            self._create()
        return self._draw.choice(list(self._held.values()))

    def _new_token(self) -> str:
        self._count += 1
        return f"{self._name}-{self._count}"

    def _adopt(self, known: Known) -> None:
        self._held[known.id] = known
        say(what="told", worker=self._name, id=known.id)

    # Operations.

    def _create(self) -> None:
        if len(self._held) >= MAX_HELD:
            self._close()
            return
        start = time.monotonic()
        body = {"metadata": {"client": self._name}, "template": self._draw.choice(self._engine.templates)}
        found = self._call(None, "POST", "/v1/sandboxes", body, limit_s=CREATE_S).json()
        self._adopt(Known(found["id"], start))

    def _exec(
        self, known: Known, code: str, language: str = "python", timeout_s: float = CELL_S
    ) -> list[dict[str, Any]]:
        body = {"code": code, "language": language, "timeout_seconds": timeout_s}
        path = f"/v1/sandboxes/{known.id}/exec"
        events = self._call(known, "POST", path, body, limit_s=timeout_s + CELL_END_S).events()
        if not events or events[-1]["type"] != "exit":
            raise Violation(f"{known.id}: a whole answer without exit: {events[-3:]}")
        if [event["seq"] for event in events] != list(range(len(events))):
            raise Violation(f"{known.id}: events out of order")
        return events

    def _token(self, known: Known | None = None) -> bool:
        """A cell whose answer is known beforehand.  Whether the Python process was said to be a new one."""
        known = known or self._pick()
        token = self._new_token()
        before = set(known.states)
        known.may_have_run(token)
        events = self._exec(known, CELL.format(token=token))
        last, said = events[-1], [event["data"] for event in events if event["type"] == "stdout"]
        words = said[0].split() if said else []
        if len(said) > 1 or (words and words[0] != token):
            raise Violation(f"{known.id}: {token} was answered with {said}")
        if last["reason"] == "ended":
            if last["data"] != 0 or len(words) != 3:
                raise Violation(f"{known.id}: {token} ended with {events}")
            known.states = before
            known.has_run(token, words[1], restarted=last["restarted"])
            if p.FAMILY in self._engine.of_each_sandbox:  # else it is a VM's own first process
                known.born = words[2]
            return bool(last["restarted"])
        raise self._not_ended(known, last)

    def _not_ended(self, known: Known, last: dict[str, Any]) -> _Refused:
        """Of a cell that was killed, took too long, or lost its sandbox."""
        if last["restarted"]:
            known.restarted()
        if last["reason"] == "sandbox_failed":
            self._look(known)
            if known.id in self._held:
                raise Violation(f"{known.id} lives, though a cell says that it is gone")
        return _Refused(last["reason"])

    def _bash(self) -> None:
        known, token = self._pick(), self._new_token()
        before = set(known.states)
        known.may_be_lost()
        events = self._exec(known, f"(sleep 300 & ) ; sleep 0.0{self._draw.randint(1, 9)} ; echo {token}", "bash")
        last, said = events[-1], [event["data"] for event in events if event["type"] == "stdout"]
        if said not in ([], [token]):
            raise Violation(f"{known.id}: {token} was answered with {said}")
        known.states = before
        if last["restarted"]:
            known.restarted()
        if last["reason"] != "ended":
            raise self._not_ended(known, last)
        # With its sleep killed, bash goes on to the echo.
        if said != [token] or last["data"] != 0:
            raise Violation(f"{known.id}: {token} ended with {events}")

    def _endless(self) -> None:
        """A cell that must be stopped."""
        known = self._pick()
        before = set(known.states)
        known.may_be_lost()
        last = self._exec(known, "while True: pass", timeout_s=0.2)[-1]
        if last["reason"] == "timed_out" and not last["restarted"]:
            known.states = before
            return
        raise self._not_ended(known, last)

    def _leave(self) -> None:
        """Go away in the middle of a stream; the cell is interrupted, and the sandbox goes on."""
        known = self._pick()
        token = self._new_token()
        known.may_be_lost()  # where the interrupt does not help, and nobody is there to be told
        body = {"code": f"while True: print({token!r}, flush=True)", "timeout_seconds": CELL_S}
        path = f"/v1/sandboxes/{known.id}/exec"
        piece = self._caller.leave("POST", path, body, limit_s=CELL_S + CELL_END_S)
        for line in piece.split(b"\n")[:-1]:
            if line and (event := json.loads(line)).get("type") == "stdout" and event["data"] != token:
                raise Violation(f"{known.id}: the stream of {token} holds {event}")

    def _fork(self) -> None:
        parent = self._pick()
        start, count = time.monotonic(), self._draw.randint(1, 2)
        path, body = f"/v1/sandboxes/{parent.id}/fork", {"n": count, "timeout_seconds": FORK_S}
        children = self._call(parent, "POST", path, body, limit_s=FORK_S + CELL_END_S).json()["children"]
        if len(children) != count:
            raise Violation(f"{parent.id}: {count} forks were asked for, got {children}")
        forks = [parent.fork(child, start) for child in children]
        for fork in forks:
            self._adopt(fork)
        # A Python process that was lost before the fork is told by the parent's next cell, not by the forks'.
        before = set(parent.states)
        for fork in forks:
            fork.may_be_lost()
        if not self._token(parent):
            for fork in forks:
                fork.states = before
        while len(self._held) > MAX_HELD + 2:
            self._close()

    def _pair(self) -> tuple[Known, Known] | None:
        """Two of one tree, if there are."""
        one = self._pick()
        info = self._call(one, "GET", f"/v1/sandboxes/{one.id}").json()
        relatives = [self._held[other] for other in (info["parent_id"], *info["children"]) if other in self._held]
        return (one, self._draw.choice(relatives)) if relatives else None

    def _switch(self) -> None:
        """merge_into."""
        pair = self._pair()
        if pair is None:
            return
        parent, winner = pair
        path = f"/v1/sandboxes/{parent.id}/merge_into/{winner.id}"
        before = parent.fork(parent.id, parent.since)
        parent.merge(winner)
        answer = self._caller.call("POST", path, limit_s=SWITCH_S)
        if not answer.ok:
            for one in pair:
                self._look(one)
            if winner.id in self._held:  # it is as it was, then
                parent.states, parent.files = before.states, before.files
            say(what="error", worker=self._name, code=answer.code, text=answer.json()["error"][:300])
            raise _Refused(answer.code)
        parent.become(winner)
        del self._held[winner.id]
        again = self._caller.call("GET", f"/v1/sandboxes/{winner.id}")
        if again.status != 404 or "merged into" not in again.json()["error"]:
            raise Violation(f"{winner.id} was merged away, and answers {again.status} {again.body[:200]!r}")
        self._token(parent)

    def _merge(self) -> None:
        """merge: a file that is new in the other one comes over."""
        pair = self._pair()
        if pair is None:
            return
        ours, theirs = pair
        token = self._new_token()
        path = f"/root/{token}"
        self._put(theirs, path, token.encode())
        added = self._call(ours, "GET", f"/v1/sandboxes/{ours.id}/diff/{theirs.id}?paths=/root", limit_s=DIFF_S).json()[
            "added"
        ]
        if path not in added:
            raise Violation(f"{path} is new in {theirs.id} and missing in the diff from {ours.id}: {added}")
        ours.merge(theirs)
        url = f"/v1/sandboxes/{ours.id}/merge/{theirs.id}"
        body = {"on_conflict": "theirs", "timeout_seconds": MERGE_S}
        report = self._call(ours, "POST", url, body, limit_s=MERGE_S + CELL_END_S).json()
        if not report["applied"] or path not in report["merged"]["files"]:
            raise Violation(f"{theirs.id} into {ours.id}: {path} was not merged: {report}")
        ours.files[path] = {token.encode()}
        self._get(ours, path)

    def _put(self, known: Known, path: str, content: bytes) -> None:
        known.files[path] = known.files.get(path, {None}) | {content}
        self._call(known, "PUT", f"/v1/sandboxes/{known.id}/files?path={path}", content, limit_s=FILE_S)
        known.files[path] = {content}

    def _get(self, known: Known, path: str) -> None:
        try:
            content = self._call(known, "GET", f"/v1/sandboxes/{known.id}/files?path={path}", limit_s=FILE_S).body
        except _Refused as exc:
            if exc.code != "file_missing":
                raise
            known.check_file(path, None)
        else:
            known.check_file(path, content)

    def _upload(self) -> None:
        self._put(self._pick(), FILE, f"{self._new_token()} ".encode() * self._draw.choice((1, 1000, 30_000)))

    def _download(self, known: Known | None = None) -> None:
        self._get(known or self._pick(), FILE)

    def _list(self) -> None:
        mine = dict(self._held)
        listed = {one["id"] for one in self._call(None, "GET", "/v1/sandboxes").json()["sandboxes"]}
        for known in mine.values():
            if known.id not in listed:
                self._look(known)
                if known.id in self._held:
                    raise Violation(f"{known.id} lives and is not listed")

    def _close(self, known: Known | None = None) -> None:
        known = known or self._pick()
        answer = self._caller.call("DELETE", f"/v1/sandboxes/{known.id}", limit_s=CLOSE_S)
        again = self._caller.call("GET", f"/v1/sandboxes/{known.id}")
        if answer.status != 204 or again.status != 404:
            raise Violation(f"{known.id}: closed with {answer.status}, then found with {again.status}")
        self._held.pop(known.id, None)


class _Refused(Exception):
    """An error of ours: the operation did not happen."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


_TABLE: tuple[tuple[Callable[..., None], int], ...] = (
    (Worker._create, 4), (Worker._token, 10), (Worker._bash, 3), (Worker._endless, 1), (Worker._leave, 2),
    (Worker._fork, 4), (Worker._switch, 2), (Worker._merge, 3), (Worker._upload, 2), (Worker._download, 2),
    (Worker._list, 1), (Worker._close, 2),
)  # fmt: skip
_OPERATIONS = [operation for operation, _ in _TABLE]
_WEIGHTS = [weight for _, weight in _TABLE]


def main(uds: str, name: str, seed: str, threads: str, engine: str) -> None:
    names = [f"{name}{letter}" for letter in "abcdefgh"[: int(threads)]]
    workers = [Worker(uds, one, int(seed) + n, ENGINES[engine]) for n, one in enumerate(names)]
    running = [threading.Thread(target=worker.run) for worker in workers]
    for thread in running:
        thread.start()
    sys.stdin.read()
    for worker in workers:
        worker.stop.set()
    for thread in running:
        thread.join()
    say(what="finished")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
