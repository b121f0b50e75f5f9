"""The public surface: names, laziness, signatures, and that both halves of the SDK agree."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import podflare
from podflare import AsyncClient, AsyncSandbox, Client, PtyHandle, PtyNamespace, Sandbox
from podflare.errors import BY_CODE

PUBLISHED_NAMES = {
    "Client", "Event", "ExecResult", "Language", "PtyHandle", "PtyNamespace", "PtySessionInfo", "REGIONS",
    "RegionInfo", "Sandbox", "UnknownRegionError", "close_default_client", "detect_local_region", "haversine_km",
    "nearest_region_to", "resolve_region",
}  # fmt: skip
"""Of the client 0.0.22."""

PUBLISHED_SIGNATURES = {
    "Sandbox": "(*, template, region, host, client, traceparent, api_key, timeout_seconds, idle_timeout_seconds, "
    "ram_mib, rootfs_gb, persistent, egress)",
    "Sandbox.resume": "(space_id, *, region, host, client, traceparent, api_key, timeout_seconds, "
    "idle_timeout_seconds, persistent, egress)",
    "Sandbox._from_id": "(sandbox_id, client)",
    "Sandbox.run_code": "(self, code, language)",
    "Sandbox.run_code_stream": "(self, code, language)",
    "Sandbox.fork": "(self, n)",
    "Sandbox.merge_into": "(self, winner)",
    "Sandbox.diff": "(self, other, paths)",
    "Sandbox.upload": "(self, local_path, remote_path)",
    "Sandbox.download": "(self, remote_path)",
    "Sandbox.replay": "(self)",
    "Sandbox.close": "(self)",
    "Client": "(host, timeout, traceparent, api_key)",
    "Client.close": "(self)",
    "Client.healthz": "(self)",
    "Client.create_sandbox": "(self, template, *, timeout_seconds, idle_timeout_seconds, ram_mib, rootfs_gb, "
    "persistent, egress)",
    "Client.create_sandbox_info": "(self, template, *, timeout_seconds, idle_timeout_seconds, ram_mib, rootfs_gb, "
    "persistent, egress)",
    "Client.resume_space": "(self, space_id, *, timeout_seconds, idle_timeout_seconds, persistent, egress)",
    "Client.delete_space": "(self, space_id)",
    "Client.destroy_sandbox": "(self, sandbox_id)",
    "Client.fork_sandbox": "(self, sandbox_id, n)",
    "Client.merge_into": "(self, parent_id, winner_id)",
    "Client.replay": "(self, sandbox_id)",
    "Client.exec_stream": "(self, sandbox_id, code, language)",
    "Client.pty_create_stream": "(self, sandbox_id, body)",
    "Client.pty_input": "(self, sandbox_id, pty_id, data)",
    "Client.pty_resize": "(self, sandbox_id, pty_id, cols, rows)",
    "Client.pty_kill": "(self, sandbox_id, pty_id)",
    "Client.pty_list": "(self, sandbox_id)",
    "Client.pty_attach_stream": "(self, sandbox_id, pty_id)",
    "Client.pty_read": "(self, sandbox_id, pty_id, since_seq, max_bytes, timeout_ms)",
    "PtyNamespace.create": "(self, *, cmd, cols, rows, on_data, on_exit, env, cwd, timeout_ms)",
    "PtyNamespace.attach": "(self, pty_id, *, on_data, on_exit)",
    "PtyNamespace.list": "(self)",
    "PtyHandle.send_input": "(self, data)",
    "PtyHandle.resize": "(self, cols, rows)",
    "PtyHandle.kill": "(self)",
    "PtyHandle.wait": "(self, timeout)",
    "PtyHandle.close": "(self)",
    "close_default_client": "(*, clear_disk_cache)",
    "haversine_km": "(lat1, lon1, lat2, lon2)",
    "nearest_region_to": "(lat, lon)",
    "resolve_region": "(region)",
}


def test_all_is_sorted_and_true() -> None:
    """`__all__` is sorted, has no doubles, and each name is there; nothing else public is loaded lazily."""
    names = podflare.__all__
    assert sorted(names) == sorted(set(names))
    assert names == sorted(names, key=lambda name: (name != name.upper() or name.startswith("_"), name))
    for name in names:
        assert getattr(podflare, name) is not None
    assert set(podflare._HOME_OF) | {"REGIONS", "__version__"} == set(names)
    assert set(names) <= set(dir(podflare))
    with pytest.raises(AttributeError, match="nonsense"):
        _ = podflare.nonsense  # type: ignore[attr-defined]  # the point of the test


def test_every_published_name_is_here() -> None:
    """What a program for the published client imports can be imported."""
    assert set(podflare.__all__) >= PUBLISHED_NAMES


def test_every_error_class_is_public() -> None:
    """Whatever can be raised can be imported from the package."""
    assert {cls.__name__ for cls in BY_CODE.values()} <= set(podflare.__all__)


def test_version_is_the_packages() -> None:
    """`__version__` is what the packaging says."""
    text = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text()
    assert f'\nversion = "{podflare.__version__}"\n' in text


@pytest.mark.parametrize("name", sorted(PUBLISHED_SIGNATURES))
def test_published_calls_fit(name: str) -> None:
    """Each published parameter is here, of its kind and in its place; what we add is keyword-only or last."""
    target = podflare
    for part in name.split("."):
        target = getattr(target, part)
    have = inspect.signature(target).parameters
    keyword_only = False
    position = 0
    for word in PUBLISHED_SIGNATURES[name].strip("()").split(", "):
        if word == "*":
            keyword_only = True
        elif word:
            assert word in have
            assert (have[word].kind is inspect.Parameter.KEYWORD_ONLY) == keyword_only
            if not keyword_only:
                assert list(have)[position] == word
                position += 1


@pytest.mark.parametrize(
    ("sync", "asynchronous"),
    [
        (Sandbox, AsyncSandbox),
        (Client, AsyncClient),
        (PtyNamespace, podflare.AsyncPtyNamespace),
        (PtyHandle, podflare.AsyncPtyHandle),
    ],
)
def test_both_halves_have_the_same_methods(sync: type, asynchronous: type) -> None:
    """Every public method exists in both, with the same parameters."""
    names = {name for name in dir(sync) if not name.startswith("_")}
    assert names == {name for name in dir(asynchronous) if not name.startswith("_")} - {"aclose"}
    for name in names:
        ours, theirs = getattr(sync, name), getattr(asynchronous, name)
        if callable(ours):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)


def test_importing_loads_next_to_nothing() -> None:
    """`from podflare import Sandbox` loads neither httpx nor anyio, `import podflare` nothing of ours."""
    program = (
        "import sys, podflare\n"
        "assert not [name for name in sys.modules if name.startswith('podflare.')], 'not lazy'\n"
        "from podflare import Sandbox\n"
        "heavy = {'httpx', 'anyio', 'asyncio', 'ssl', 'starlette', 'uvicorn', 'rich', 'typer', 'anthropic'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_client_module_has_the_client() -> None:
    """`from podflare.client import Client` works as it did."""
    from podflare import client

    assert client.Client is Client and client.AsyncClient is AsyncClient
    with pytest.raises(AttributeError, match="nonsense"):
        _ = client.nonsense  # type: ignore[attr-defined]  # the point of the test


def test_promised_import_paths() -> None:
    """The Anthropic handler is importable from every path that was promised somewhere."""
    import podflare.adapters.anthropic
    import podflare.anthropic
    import podflare.integrations.anthropic

    real = podflare.integrations.anthropic
    for module in (podflare.adapters.anthropic, podflare.anthropic):
        for name in module.__all__:
            assert getattr(module, name) is getattr(real, name)


def test_annotations_resolve() -> None:
    """The package is typed: its marker is there and public functions carry annotations."""
    assert (Path(podflare.__file__).parent / "py.typed").exists()
    for method in (Sandbox.run_code, Client.create_sandbox, AsyncSandbox.upload):
        assert "return" in method.__annotations__
