"""Promise: with API keys, what belongs to another key does not exist."""

from __future__ import annotations

import base64
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from daemons import ServedDaemon, served

MINE, OTHERS = "key-of-the-attacker-1", "key-of-somebody-else-2"


@pytest.fixture(scope="module")
def daemon(private_temp: Path, serve_words: tuple[str, ...]) -> Iterator[ServedDaemon]:
    """A daemon with two keys."""

    folder = Path(tempfile.mkdtemp(prefix="o", dir=private_temp))
    folder.chmod(0o711)
    with served(folder, *serve_words, env={"PODFLARE_API_KEYS": f"{MINE},{OTHERS}"}) as found:
        yield found
    shutil.rmtree(folder)


def routes(sandbox: str, own: str) -> dict[str, tuple[str, str, object]]:
    """Everything that can be asked of a sandbox, and what takes another one beside it."""
    base = f"/v1/sandboxes/{sandbox}"
    return {
        "look": ("GET", base, None),
        "run": ("POST", f"{base}/exec", {"code": "print(1)"}),
        "end": ("DELETE", base, None),
        "prolong": ("PATCH", base, {"timeout_seconds": 10}),
        "fork": ("POST", f"{base}/fork", {"n": 1}),
        "download": ("GET", f"{base}/files?path=/etc/passwd", None),
        "upload": ("PUT", f"{base}/files?path=/root/x", b"x"),
        "diff with mine": ("GET", f"{base}/diff/{own}", None),
        "diff of mine with it": ("GET", f"/v1/sandboxes/{own}/diff/{sandbox}", None),
        "merge it into mine": ("POST", f"{base}/merge_into/{own}", None),
        "merge mine into it": ("POST", f"/v1/sandboxes/{own}/merge_into/{sandbox}", None),
        "merge its changes into mine": ("POST", f"/v1/sandboxes/{own}/merge/{sandbox}", {}),
        "merge my changes into it": ("POST", f"{base}/merge/{own}", {}),
        "keep it": ("POST", f"{base}/snapshots", {"name": "x"}),
        "interrupt": ("POST", f"{base}/interrupt", None),
        "replay": ("GET", f"{base}/replay", None),
        "egress": ("GET", f"{base}/egress", None),
        "output of a cell": ("GET", f"{base}/cells/1/output", None),
        "answer its tools": ("POST", f"{base}/cells/1/tool_results", {"call": "1", "result": 1}),
        "end while it runs": ("DELETE", f"{base}?force=true", None),
        "a path that ends with /": ("GET", f"{base}/", None),
        "an id with dots": ("GET", f"/v1/sandboxes/{own}/../{sandbox}", None),
        "an encoded id": ("GET", f"/v1/sandboxes/%{ord(sandbox[0]):02x}{sandbox[1:]}", None),
        "upper case": ("GET", f"/v1/sandboxes/{sandbox.upper()}", None),
        "with a null byte": ("GET", f"{base}%00", None),
    }


@pytest.mark.both_engines
def test_another_keys_sandbox_does_not_exist(daemon, record):
    """Each route answers for a sandbox of another key as for one that never was, and does nothing to it."""
    with httpx.Client(base_url=daemon.url, timeout=30) as client:
        theirs = {"Authorization": f"Bearer {OTHERS}"}
        mine = {"Authorization": f"Bearer {MINE}"}
        own = client.post("/v1/sandboxes", headers=mine, json={}).json()["id"]
        victim = client.post("/v1/sandboxes", headers=theirs, json={}).json()["id"]
        client.post(f"/v1/sandboxes/{victim}/exec", headers=theirs, json={"code": "kept = 4711"})
        found = {}
        nobody = "sb_" + "0" * (len(victim) - 3)
        for name, (method, path, body) in routes(victim, own).items():
            content = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
            answer = client.request(method, path, headers=mine, **content)
            same = client.request(method, path.replace(victim, nobody), headers=mine, **content)
            well = (
                answer.status_code in (404, 405)
                and answer.status_code == same.status_code
                and "4711" not in answer.text
            )
            text = answer.text.replace(victim, nobody)
            found[name] = (
                "held"
                if well and text == same.text
                else f"broke: {answer.status_code} {answer.text[:200]}, {same.status_code} {same.text[:200]}"
            )
        listed = client.get("/v1/sandboxes", headers=mine).text
        found["list"] = "broke" if victim in listed else "held"
        kept = client.post(f"/v1/sandboxes/{victim}/exec", headers=theirs, json={"code": "print(kept)"})
        assert '"4711"' in kept.text, kept.text
        for key, sandbox in ((theirs, victim), (mine, own)):
            assert client.delete(f"/v1/sandboxes/{sandbox}", headers=key).status_code in (200, 204)
    record(found)


KEYS = {
    "none": {},
    "an empty one": {"Authorization": "Bearer"},
    "no scheme": {"Authorization": OTHERS[:-1]},
    "the beginning of one": {"Authorization": f"Bearer {OTHERS[:-1]}"},
    "more than one": {"Authorization": f"Bearer {OTHERS}x"},
    "upper case": {"Authorization": f"Bearer {OTHERS.upper()}"},
    "both, with a comma": {"Authorization": f"Bearer {MINE},{OTHERS}"},
    "a space too many": {"Authorization": f"Bearer  {OTHERS} x"},
    "by Basic": {"Authorization": "Basic " + base64.b64encode(f"x:{OTHERS[:-1]}".encode()).decode()},
    "in the query": {},
    "in a cookie": {"Cookie": f"token={OTHERS}; Authorization={OTHERS}"},
    "in another header": {"X-Forwarded-Authorization": f"Bearer {OTHERS}", "X-Authorization": f"Bearer {OTHERS}"},
    "as a user of a proxy": {"X-Forwarded-User": "local", "X-Remote-User": "local", "X-Forwarded-For": "127.0.0.1"},
    "of the unkeyed owner": {"Authorization": "Bearer local"},
    "its hash": {"Authorization": "Bearer " + __import__("hashlib").sha256(OTHERS.encode()).hexdigest()},
    "null": {"Authorization": "Bearer null"},
    "a wildcard": {"Authorization": "Bearer *"},
    "a path": {"Authorization": "Bearer ../" + OTHERS},
    "of a megabyte's beginning": {"Authorization": "Bearer " + "x" * 30_000},
}  # fmt: skip


def test_only_a_whole_key_is_one(daemon, record):
    """What is almost a key, or a key in another place, opens nothing."""
    found = {}
    with httpx.Client(base_url=daemon.url, timeout=30) as client:
        for name, headers in KEYS.items():
            path = f"/v1/sandboxes?api_key={OTHERS}&token={OTHERS}" if name == "in the query" else "/v1/sandboxes"
            for method in ("GET", "POST"):
                answer = client.request(method, path, headers=headers)
                refused = answer.status_code in (400, 401, 403, 431)
                found[f"{name}, {method}"] = "held" if refused else f"broke: {answer.status_code} {answer.text[:100]}"
        assert client.get("/v1/sandboxes", headers={"Authorization": f"Bearer {OTHERS}"}).json() == {"sandboxes": []}
    record(found)
