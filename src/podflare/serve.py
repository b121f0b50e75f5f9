"""Composition root of the daemon: settings -> engines -> host -> HTTP server, and how they start and end.

Engines start before the web stack is imported: the zygote then prepares itself while this process imports.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import resource
import signal
import socket
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

from podflare.engines.base import Engine, EngineOptions, EngineReport, Limits, MachineSpec
from podflare.errors import BadRequest
from podflare.host import telemetry
from podflare.host.config import Config, check_start, default_image_dir, vmm_of
from podflare.host.engines import Engines
from podflare.host.recover import Instance, open_instance
from podflare.host.store import MemoryStore, SqliteStore, Store
from podflare.wire.api import DEFAULT_TEMPLATE

if TYPE_CHECKING:
    from podflare.engines.microvm.image.build import Built
    from podflare.engines.microvm.image.store import ImageStore as ImageStore

ENGINES = ("process", "microvm")
"""Engines of this version, the first being the default."""
KEEP_ALIVE_S = 75
"""Above every client's idle expiry, so that it is the client who closes and no request meets a closing connection."""
BACKLOG = 2048
PROBE_TIMEOUT_S = 15.0
TRY_TIMEOUT_S = 90.0
"""Includes the first import of all that a template preloads."""


def serve_forever(**given: Any) -> int:
    """Serve until SIGTERM, SIGINT or the end of the parent; the exit code.  `given`: fields of host.config.Config.

    Raises: BadRequest for settings that cannot work; IsolationIncomplete if no sandbox can be made here.
    """
    return serve(Config.from_environment(os.environ, **given))


def serve(config: Config, engine: Callable[[EngineOptions], Engine] | None = None) -> int:
    """Serve as `config` says until told to end; blocks; the exit code.  `engine` takes the place of the named ones.

    Raises: as serve_forever.
    """
    telemetry.configure(config.log_format, config.log_level)
    _allow_open_files()
    warning = check_start(config)
    if warning:
        telemetry.problem(warning)
    makers = {"given": engine} if engine is not None else {name: _engine(name)[0] for name in config.engines}
    sock = listen(config)
    try:
        instance = open_instance(config.data_dir, _reap)
        try:
            engines = Engines(
                *(make(_options(config, instance, name)) for name, make in makers.items()),
                later=_on_request(config, instance),
            )
            anyio.run(
                functools.partial(_run, config, engines, instance, sock),
                backend="asyncio",
                backend_options={"use_uvloop": True},
            )
        finally:
            instance.close()
    finally:
        sock.close()
        if config.uds is not None:
            Path(config.uds).unlink(missing_ok=True)
    return 0


def _options(config: Config, instance: Instance, engine: str) -> EngineOptions:
    """What an engine is told; it gets a directory and a name of its own within the daemon's."""
    folder = instance.directory / engine
    folder.mkdir(exist_ok=True)
    folder.chmod(instance.directory.stat().st_mode & 0o777)
    return EngineOptions(
        data_dir=str(folder),
        instance=f"{instance.name}-{engine}",
        require=config.require,
        template_dir="" if config.template_dir is None else str(config.template_dir.absolute()),
        image_dir="" if config.image_dir is None else str(config.image_dir.absolute()),
        # A private daemon's go with it, as all that it has.
        snapshot_dir=str((folder if config.embedded else config.data_dir.absolute()) / "snapshots"),
        vmm=config.vmm,
        firecracker="" if config.firecracker is None else str(config.firecracker.absolute()),
        disk_bytes_per_s=config.disk_rate_mib << 20,
        disk_operations_per_s=config.disk_rate_operations,
    )


def _on_request(config: Config, instance: Instance) -> dict[str, Callable[[], Engine]]:
    """The engines that are started when somebody asks for them."""

    def make(name: str) -> Engine:
        return _engine(name)[0](_options(config, instance, name))

    names = [name for name in ENGINES if config.engines_on_request and name not in config.engines]
    return {name: functools.partial(make, name) for name in names}


def _reap(directory: Path, instance: str) -> None:
    """See host.recover.Reap: of each engine that the dead daemon had.  Directories and names as in _options."""
    for name in ENGINES:
        if (directory / name).is_dir():
            try:
                _, reap = _engine(name)
            except BadRequest as exc:
                raise OSError(str(exc)) from exc
            reap(directory / name, f"{instance}-{name}")


def _allow_open_files() -> None:
    """As many as this user may have: the usual soft limit of 1024 ends at a hundred sandboxes."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def probe_engines() -> list[EngineReport]:
    """What this computer offers to each engine, with the images of this user.  Starts nothing lasting."""
    vmm, firecracker = vmm_of(os.environ)
    options = EngineOptions(
        "/nonexistent",
        "probe",
        image_dir=str(default_image_dir(os.environ)),
        vmm=vmm,
        firecracker="" if firecracker is None else str(firecracker.absolute()),
    )
    return anyio.run(_probe, options)


async def _probe(options: EngineOptions) -> list[EngineReport]:
    from podflare.egress.keeper import what_is_missing  # here: the daemon itself needs it for its first network only

    reports = []
    for name in ENGINES:
        try:
            make, _ = _engine(name)
        except BadRequest as exc:
            reports.append(EngineReport(name, usable=False, walls=(), problem=str(exc)))
            continue
        with anyio.fail_after(PROBE_TIMEOUT_S):
            found = await make(options).probe()
        reports.append(replace(found, no_uplink=found.no_uplink or what_is_missing()))
    return reports


def try_template(template_dir: Path, name: str) -> None:
    """Start a sandbox of a built template and end it, with an engine that lives for that.

    Raises: as Engine.start and Engine.create.
    """
    make, reap = _engine(ENGINES[0])
    with tempfile.TemporaryDirectory(prefix="podflare-try-") as folder:
        Path(folder).chmod(0o711)  # a machine of a root daemon enters with another id
        instance = Path(folder).name
        try:
            options = EngineOptions(data_dir=folder, instance=instance, template_dir=str(template_dir))
            anyio.run(_start_one, make(options), name)
        finally:
            reap(Path(folder), instance)


async def _start_one(engine: Engine, template: str) -> None:
    try:
        await engine.start()
        info = engine.describe(template)
        limits = Limits(memory_bytes=info.ram_mib << 20, disk_bytes=info.rootfs_gb << 30, cpus=info.cpus)
        machine = await engine.create(MachineSpec(template, limits), timeout_s=TRY_TIMEOUT_S)
        await machine.aclose()
    finally:
        with anyio.CancelScope(shield=True):
            await engine.aclose()


def image_store(folder: Path) -> ImageStore:
    """The store of images of virtual machines in `folder`."""
    from podflare.engines.microvm.image.store import ImageStore

    return ImageStore(folder.absolute())


def build_image(
    template: str, store: ImageStore, *, again: bool, tell: Callable[[str, float], None], sources: Path | None = None
) -> Built:
    """Build the image of a template: `default`, a shipped one, or a definition's file.  As engines.microvm.image.build.

    Raises: BadRequest for a template that is not one; TemplateFailed.
    """
    from podflare.engines.microvm.image import recipe
    from podflare.engines.microvm.image.build import build
    from podflare.engines.templates.definition import load

    wanted = recipe.default() if template == DEFAULT_TEMPLATE else recipe.of(load(template))
    return build(wanted, store, again=again, tell=tell, sources=sources)


def _engine(name: str) -> tuple[Callable[[EngineOptions], Engine], Callable[[Path, str], None]]:
    """An engine's maker and its reaper.  Raises: BadRequest for an unknown name, and for one that lacks a package."""
    if name == "process":
        from podflare.engines.process.engine import ProcessEngine

        return ProcessEngine, ProcessEngine.reap
    if name == "microvm":
        try:
            from podflare.engines.microvm.engine import MicrovmEngine
        except ModuleNotFoundError as exc:
            raise BadRequest(f"the microvm engine needs {exc.name}: pip install 'podflare[microvm]'") from exc

        return MicrovmEngine, MicrovmEngine.reap
    raise BadRequest(f"unknown engine {name!r}; this version has: {', '.join(ENGINES)}")


# The socket.


def listen(config: Config) -> socket.socket:
    """The bound, listening socket.  Raises: BadRequest with what to do."""
    try:
        return _listen_unix(config.uds) if config.uds is not None else _listen_tcp(config.host, config.port)
    except OSError as exc:
        where = config.uds or f"{config.host}:{config.port}"
        raise BadRequest(f"cannot listen on {where}: {exc}") from exc


def _listen_tcp(host: str, port: int) -> socket.socket:
    family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    sock = socket.socket(family, kind, number)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _listen_unix(path: str) -> socket.socket:
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Under this umask the socket is never, not for a moment, open to others.
        before = os.umask(0o177)
        try:
            sock.bind(path)
        finally:
            os.umask(before)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody serves.  Raises: OSError if somebody does, or if it is something else."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(f"{path} exists and is not a socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink()
        else:
            raise FileExistsError(f"another process serves {path}")


def _address(config: Config, sock: socket.socket) -> str:
    if config.uds is not None:
        return f"unix://{config.uds}"
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# The life of the daemon.


async def _run(config: Config, engines: Engines, instance: Instance, sock: socket.socket) -> None:
    stop = anyio.Event()
    with _ending(config, stop):
        importing = asyncio.get_running_loop().run_in_executor(None, _import_web)
        try:
            await engines.start()
        finally:
            await importing
        await serve_until(stop, config, engines, instance, sock)


async def serve_until(
    stop: anyio.Event, config: Config, engines: Engines, instance: Instance, sock: socket.socket
) -> None:
    """Serve on `sock` with started engines until `stop` is set; then end every sandbox, the engines and the server."""
    from podflare.host.app import App
    from podflare.host.daemon import Daemon

    store: Store = MemoryStore()
    if not config.embedded:
        store = SqliteStore(config.data_dir / "sandboxes.sqlite", instance.name, instance.living)
    daemon = Daemon(config, engines, store, instance)
    async with anyio.create_task_group() as tasks:
        await daemon.run(tasks)
        async with _server(App(daemon, config), sock):
            try:
                if config.announce:
                    _announce(config, engines, sock)
                address, names = _address(config, sock), ",".join(engines.names)
                told = {f"how_{engine.name}": engine.how for engine in engines.started if engine.how}
                telemetry.event("daemon ready", address=address, engines=names, instance=instance.name, **told)
                await stop.wait()
            finally:
                # Before the server: streams of cells end with their cause instead of breaking off.
                with anyio.CancelScope(shield=True):
                    await daemon.shut_down()
        tasks.cancel_scope.cancel()


def _announce(config: Config, engines: Engines, sock: socket.socket) -> None:
    line = {
        "ready": True,
        "address": _address(config, sock),
        "engine": engines.default.name,
        "engines": engines.names,
        "pid": os.getpid(),
    }
    print(json.dumps(line), flush=True)


@contextlib.contextmanager
def _ending(config: Config, stop: anyio.Event) -> Iterator[None]:
    """Set `stop` on SIGTERM, SIGINT and the end of the parent process."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    parent = -1
    if config.parent_pid is not None:
        try:
            parent = os.pidfd_open(config.parent_pid)
        except ProcessLookupError:
            stop.set()
        else:
            loop.add_reader(parent, stop.set)
    try:
        yield
    finally:
        if parent >= 0:
            loop.remove_reader(parent)
            os.close(parent)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


def _import_web() -> None:
    """Load what serving needs, in a thread: the engine starts meanwhile."""
    import uvicorn.lifespan.off  # noqa: F401  # uvicorn would load it when it starts, in the event loop

    import podflare.host.app
    import podflare.host.daemon
    import podflare.host.httpserver  # noqa: F401  # for its effect: the modules are loaded


@contextlib.asynccontextmanager
async def _server(app: Any, sock: socket.socket) -> AsyncIterator[None]:
    """Serve `app` on `sock` within the block."""
    from podflare.host.httpserver import make_server

    server = make_server(app, keep_alive_s=KEEP_ALIVE_S)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(functools.partial(server.serve, sockets=[sock]))
        await server.accepting.wait()
        try:
            yield
        finally:
            server.should_exit = True
