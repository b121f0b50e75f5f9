"""Built templates on a real kernel: what their sandboxes have, what is preloaded and with which rights, what breaks."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

from interpreters import VERSIONS, find_python
from machines import LIMITS, DrivenMachine
from podflare.engines.base import EngineOptions, MachineSpec
from podflare.engines.process.engine import ProcessEngine
from podflare.engines.process.facts import read_facts
from podflare.engines.process.template_plan import plan_template
from podflare.engines.process.zygote import Zygote
from podflare.engines.templates.build import build
from podflare.engines.templates.definition import parse
from podflare.engines.templates.pip import Sources
from podflare.engines.templates.store import TemplateStore
from podflare.errors import MachineFailed, TemplateFailed, UnknownTemplate
from podflare.wire.plan import IdMap
from podflare.wire.uplink import Uplink
from wheels import make_wheel

# What it sees while it is imported is what a hostile package would see.
SNOOP = """
import os, sys
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
caps = int(status["CapEff"], 16) | int(status["CapPrm"], 16)
uids = os.getresuid()
top = sorted(os.listdir("/"))
home = os.listdir("/home") if os.path.isdir("/home") else []
interfaces = [line.split(":")[0].strip() for line in open("/proc/self/net/dev") if ":" in line]
def attempt(action, *args):
    try:
        action(*args)
    except OSError as exc:
        return exc.errno
    return 0
opened = attempt(open, HOST_FILE)
written = attempt(open, __file__, "a")
print("noise", file=sys.stderr)
"""
# A stand-in with numpy's global state, which all sandboxes of a template would share.
NUMPY = "state = None\ndef seed(words):\n    global state\n    state = list(words)\nseed([1])\n"
DEFINITION = """
name = "{name}"
packages = ["snoop"]
preload = ["snoop", "numpy.random"]
[environment]
MODE = "{name}"
[files]
"/root/note.txt" = "note.txt"
"/data/set" = "set"
"""


def make(root: Path, store: TemplateStore, name: str, text: str = DEFINITION) -> None:
    """Build a template, with the wheels in `root` and no index."""
    build(
        parse(text.format(name=name).encode(), root), store, sources=Sources((str(root),), no_index=True), again=False,
        attempt=lambda scratch, built: None, tell=lambda step: None,
    )  # fmt: skip


@pytest.fixture(scope="module")
def root(private_temp: Path) -> Iterator[Path]:
    """A folder with a store, wheels, and a file that no sandbox may read."""
    with tempfile.TemporaryDirectory(prefix="t", dir=private_temp) as name:
        folder = Path(name)
        (folder / "secret").write_text("the host's")
        (folder / "note.txt").write_text("from the template")
        (folder / "set").mkdir()
        (folder / "set" / "rows").write_text("1\n2\n")
        snoop = f"HOST_FILE = {str(folder / 'secret')!r}\n{SNOOP}"
        make_wheel(folder, "snoop", "1.5", {"snoop.py": snoop, "numpy/__init__.py": "", "numpy/random.py": NUMPY})
        make(folder, TemplateStore(folder / "store"), "tiny")
        # No pip a second time: the same tree under another name.
        copy_template(folder, "tiny", "twin")
        yield folder


def copy_template(root: Path, name: str, new_name: str, **changes: object) -> None:
    """A template that differs from another one in what its manifest says."""
    store = TemplateStore(root / "store")
    manifest = replace(store.read(name), name=new_name, environment=(("MODE", new_name),))
    store.put(replace(manifest, **changes))  # type: ignore[arg-type]


@contextmanager
def started(portal: BlockingPortal, root: Path) -> Iterator[ProcessEngine]:
    """An engine that knows the templates."""
    with tempfile.TemporaryDirectory(prefix="e", dir=root.parent) as folder:
        Path(folder).chmod(0o711)
        options = EngineOptions(data_dir=folder, instance=Path(folder).name, template_dir=str(root / "store"))

        async def make_engine() -> ProcessEngine:
            made = ProcessEngine(options)
            await made.start()
            return made

        made = portal.call(make_engine)
        try:
            yield made
        finally:
            portal.call(made.aclose)


def create(portal: BlockingPortal, engine: ProcessEngine, template: str, uplink: Uplink | None = None) -> DrivenMachine:
    """A new machine of a template."""
    spec = MachineSpec(template, LIMITS, uplink=uplink)
    return DrivenMachine(portal, portal.call(functools.partial(engine.create, spec, timeout_s=30)))


@pytest.fixture(scope="module")
def templated(portal: BlockingPortal, root: Path) -> Iterator[ProcessEngine]:
    """An engine with a warm zygote for each of the two templates."""
    with started(portal, root) as engine:
        for name in ("tiny", "twin"):
            create(portal, engine, name).close()
        yield engine


@pytest.fixture
def new(portal: BlockingPortal, templated: ProcessEngine) -> Iterator[Callable[..., DrivenMachine]]:
    """new(template, uplink) -> a machine, closed at the end of the test."""
    made: list[DrivenMachine] = []

    def do(template: str, uplink: Uplink | None = None) -> DrivenMachine:
        made.append(create(portal, templated, template, uplink))
        return made[-1]

    yield do
    for machine in made:
        machine.close()


def test_a_sandbox_has_what_its_template_brings(new: Callable[[str], DrivenMachine]) -> None:
    """Packages, files, directories and environment are there, in Python and in bash, and its `python` is the REPL's."""
    machine = new("tiny")
    assert machine.run("import snoop; print(snoop.__file__)").stdout == "/opt/template/packages/snoop.py\n"
    assert machine.run("print(open('/root/note.txt').read(), open('/data/set/rows').read())").stdout == (
        "from the template 1\n2\n\n"
    )
    assert machine.run("import os, importlib.metadata as m; print(os.environ['MODE'], m.version('snoop'))").stdout == (
        "tiny 1.5\n"
    )
    out = machine.run("cd /; python -c 'import snoop, sys; print(snoop.__name__, sys.version_info[:2])'", "bash")
    assert out.stdout == machine.run("import sys; print('snoop', sys.version_info[:2])").stdout, out.stderr


def test_preloaded_modules_are_there_before_they_are_imported(new: Callable[[str], DrivenMachine]) -> None:
    """They are in sys.modules of a new REPL, of a fork, and importable in a REPL that had to be started anew."""
    machine = new("tiny")
    assert machine.run("import sys; print('snoop' in sys.modules, 'podflare' in sys.modules)").stdout == "True False\n"
    (child,) = machine.fork()
    try:
        assert child.run("import snoop; print(snoop is sys.modules['snoop'])").stdout == "True\n"
    finally:
        child.close()
    machine.run("import os; os._exit(3)")
    assert machine.run("import snoop; print(snoop.__file__)").stdout == "/opt/template/packages/snoop.py\n"


def test_global_random_state_differs_between_sandboxes(new: Callable[[str], DrivenMachine]) -> None:
    """What numpy.random was seeded with when it was preloaded is in no sandbox, and no two have the same."""
    states = [new("tiny").run("import numpy.random; print(numpy.random.state)").stdout for _ in range(3)]
    assert len(set(states)) == 3 and "[1]\n" not in states


def test_preloaded_code_has_no_privileges(new: Callable[[str], DrivenMachine]) -> None:
    """While a package is imported for all sandboxes it has no capability, no network, and not the machine's files."""
    seen = json.loads(
        new("tiny")
        .run(
            "import json, snoop as s; print(json.dumps({name: getattr(s, name) for name in"
            " ('caps', 'uids', 'top', 'home', 'interfaces', 'opened', 'written')}))"
        )
        .stdout
    )
    assert seen["caps"] == 0
    assert seen["home"] == [] and seen["interfaces"] == ["lo"]
    assert seen["opened"] and seen["written"], "neither the machine's files nor the template's can be opened for that"
    assert "var" not in seen["top"] and "opt" in seen["top"]
    if os.geteuid() == 0:
        assert min(seen["uids"]) >= 0x7001_0000, "an id that is neither an account's nor a sandbox's"


def test_a_template_that_preloads_can_have_a_way_out(new: Callable[..., DrivenMachine]) -> None:
    """Machines forked from a process without privileges get their one interface, too."""
    machine = new("tiny", Uplink())
    assert machine.machine.uplink is not None
    assert machine.run("print('eth0' in open('/proc/net/dev').read())").stdout == "True\n"


def test_two_templates_side_by_side(new: Callable[[str], DrivenMachine]) -> None:
    """Each sandbox has its own template's environment, and the default one has neither packages nor files of them."""
    machines = [new("tiny"), new("default"), new("twin")]
    found = [machine.run("import os; print(os.environ.get('MODE'))").stdout.strip() for machine in machines]
    assert found == ["tiny", "None", "twin"]
    assert machines[1].run("import os; print(os.path.exists('/opt/template'))").stdout == "False\n"
    assert machines[1].run("import snoop").error.name == "ModuleNotFoundError"


def test_a_sandbox_cannot_change_its_template(new: Callable[[str], DrivenMachine]) -> None:
    """Whatever one writes to packages and files, where it can, is its own: another one has the template's."""
    first = new("tiny")
    first.run(
        "for d in /opt/template/packages /data/set; do echo 'evil = 1' > $d/snoop.py; rm -rf $d/rows; done;"
        " echo x > /root/note.txt; rm -rf /opt/template/packages/*; chmod 777 /data/set",
        "bash",
    )
    second = new("tiny")
    assert second.run("import snoop; print(hasattr(snoop, 'evil'), open('/root/note.txt').read())").stdout == (
        "False from the template\n"
    )
    listing = "python -c 'import snoop; print(snoop.home)'; ls /data/set; stat -c %a /data/set"
    assert second.run(listing, "bash").stdout == "[]\nrows\n755\n"


def test_the_machines_own_packages_are_hidden(new: Callable[[str], DrivenMachine]) -> None:
    """A template's sys.path is the standard library and its packages; site-packages of the machine are empty there."""
    machine = new("tiny")
    code = "import site, os; print([os.listdir(p) for p in site.getsitepackages() if os.path.isdir(p)], sys.path[-1])"
    out = machine.run("import sys; " + code).stdout
    assert out.endswith("/opt/template/packages\n") and not out.partition("]")[0].strip("["), out


def test_processor_time_is_limited(new_machine: Callable[..., DrivenMachine]) -> None:
    """A machine that may use a fifth of a processor gets about that, where control groups can hold it."""
    machine = new_machine(replace(LIMITS, cpus=0.2))
    if "cpu_limit" not in machine.machine.walls:
        pytest.skip("no cpu control group can be had here")
    code = "import time\nend = time.monotonic() + 0.6\nwhile time.monotonic() < end: pass\nprint(time.process_time())"
    machine.run("import time; before = time.process_time()")
    used = float(machine.run(code).stdout) - float(machine.run("print(before)").stdout)
    assert used < 0.4


@pytest.mark.parametrize("version", [VERSIONS[0], VERSIONS[-2]])
def test_a_template_can_have_another_python(portal: BlockingPortal, root: Path, version: str) -> None:
    """A template runs on the interpreter that it names, in its REPL and as `python3`; packages of that one are hidden."""
    python = find_python(version)
    if python is None or version == f"{sys.version_info[0]}.{sys.version_info[1]}":
        pytest.skip(f"no other Python {version} on PATH or in ~/.pyenv/versions")
    make(root, TemplateStore(root / "store"), "other", f"name = '{{name}}'\npython = '{python}'\n")
    with started(portal, root) as engine:
        machine = create(portal, engine, "other")
        code = "import sys; print('%d.%d' % sys.version_info[:2])"
        assert machine.run(code).stdout == f"{version}\n"
        assert machine.run(f'python3 -c "{code}"', "bash").stdout == f"{version}\n"
        assert machine.run("import pip").error.name == "ModuleNotFoundError"
        machine.close()
    TemplateStore(root / "store").remove("other")


def test_it_is_described(templated: ProcessEngine) -> None:
    """The engine tells name, packages and preload, and that the modules are preloaded here."""
    info = templated.describe("tiny")
    assert (info.name, dict(info.packages), info.preload) == ("tiny", {"snoop": "1.5"}, ("snoop", "numpy.random"))
    assert info.problem == "" and info.not_preloaded == "" and info.version
    assert {"default", "tiny", "twin"} <= set(templated.templates)


def test_a_broken_template_harms_nobody_else(portal: BlockingPortal, root: Path) -> None:
    """One that cannot be imported, or whose files are damaged, fails with its name and why; the others work on."""
    copy_template(root, "tiny", "bad", preload=("snoop", "no.such"))
    (root / "store" / "worse.json").write_text("{")
    try:
        with started(portal, root) as engine:
            with pytest.raises(TemplateFailed, match=r"'bad' cannot start: no\.such cannot be imported.*No module"):
                create(portal, engine, "bad")
            with pytest.raises(TemplateFailed, match="'worse' is damaged"):
                create(portal, engine, "worse")
            assert "damaged" in engine.describe("worse").problem
            with pytest.raises(UnknownTemplate, match=r"'none'; there is: default, bad, tiny"):
                create(portal, engine, "none")
            for name in ("default", "tiny"):
                machine = create(portal, engine, name)
                assert machine.run("print(1)").stdout == "1\n"
                machine.close()
    finally:
        for name in ("bad", "worse"):
            (root / "store" / f"{name}.json").unlink()


def test_changes_are_found_by_a_running_engine(portal: BlockingPortal, root: Path) -> None:
    """A new template is found, a rebuilt one used from the next sandbox on, a dead zygote replaced, a removed one gone.

    The sandbox that was there before lives through all of it.
    """
    store = TemplateStore(root / "store")
    trees = store.root / "trees"
    shutil.copytree(store.tree(store.read("tiny")), trees / "before")
    for name in ("packages", "folders", "files"):
        (trees / "after" / name).mkdir(parents=True)
    (trees / "after" / "lock").touch()
    with started(portal, root) as engine:
        copy_template(root, "tiny", "late", key="before")
        first = create(portal, engine, "late")
        copy_template(root, "tiny", "late", key="after", preload=(), files=(), folders=())
        second = create(portal, engine, "late")
        assert second.run("import snoop").error.name == "ModuleNotFoundError"
        kill_zygotes(engine)
        third = create(portal, engine, "late")
        store.remove("late")  # and every tree that no name means and nobody uses
        with pytest.raises(UnknownTemplate):
            create(portal, engine, "late")
        assert (trees / "before").exists() and (trees / "after").exists()
        assert first.run("import snoop; print(open('/data/set/rows').read())").stdout == "1\n2\n\n"
        (child,) = first.fork()
        first.close()
        assert child.run("import snoop; print(open('/data/set/rows').read())").stdout == "1\n2\n\n"
        for machine in (child, second, third):
            assert machine.run("print(1)").stdout == "1\n"
            machine.close()
    copy_template(root, "tiny", "late")
    store.remove("late")
    assert not (trees / "before").exists() and not (trees / "after").exists()


def test_without_namespaces_for_ordinary_users_nothing_is_preloaded(portal: BlockingPortal, root: Path) -> None:
    """Where a process without privileges cannot make a user namespace, no package is imported, and it is told why.

    Ids that no kernel maps stand in for a kernel that lets only root make such namespaces.
    """
    store = TemplateStore(root / "store")
    manifest = store.read("tiny")
    facts = read_facts(manifest.python)
    with tempfile.TemporaryDirectory(prefix="z", dir=root.parent) as folder:
        stage, machines = Path(folder, "stage"), Path(folder, "machines")
        stage.mkdir()
        machines.mkdir()
        plan = plan_template(
            facts, manifest, str(store.tree(manifest)), mine=True, map_ids=False,
            stage_dir=str(stage), machines_dir=str(machines), filters=(),
        )  # fmt: skip
        zygote = Zygote(facts.python, Path(folder, "bundle"))
        portal.call(zygote.start, replace(plan, ids=IdMap(plan.ids.first, 0)))
        try:
            assert "Invalid argument" in zygote.cold and zygote.alive
        finally:
            portal.call(zygote.aclose)


def test_a_zygote_that_dies_with_an_order_in_hand(portal: BlockingPortal, root: Path) -> None:
    """Whoever ordered is told; the daemon does not wait for the sandboxes that have its last words' pipe, too; a dead
    zygote is no zombie, though nobody asks for its template again."""
    with started(portal, root) as engine:
        living = create(portal, engine, "tiny")
        warm = engine._zygotes._warm["tiny"].zygote
        assert warm._process is not None
        pid = warm._process.pid
        os.kill(pid, signal.SIGSTOP)
        for part in children_of(pid):  # the part of it that makes families
            os.kill(part, signal.SIGSTOP)
        ordered = portal.start_task_soon(functools.partial(engine.create, MachineSpec("tiny", LIMITS), timeout_s=20))
        deadline = time.monotonic() + 20
        while not warm._lock.locked() and time.monotonic() < deadline:
            time.sleep(0.005)
        for one in (*children_of(pid), pid):
            os.kill(one, signal.SIGKILL)
        with pytest.raises(MachineFailed, match="the zygote died"):
            ordered.result(30)
        assert living.run("print(6 * 7)").stdout == "42\n"
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not Path(f"/proc/{pid}").exists()
        living.close()


def test_a_zygote_that_dies_before_an_order(portal: BlockingPortal, root: Path) -> None:
    """One whose end the daemon has not noticed yet: whoever orders is told the same."""
    with started(portal, root) as engine:
        create(portal, engine, "tiny").close()
        warm = engine._zygotes._warm["tiny"].zygote
        assert warm._process is not None and warm._control is not None
        pid, control = warm._process.pid, warm._control

        async def order_of_a_dead_one() -> None:
            for one in (*children_of(pid), pid):
                os.kill(one, signal.SIGKILL)
            assert select.select([control], [], [], 20)[0]  # its end of the socket is closed
            with pytest.raises(MachineFailed, match="the zygote died"):
                await warm._order(control)

        portal.call(order_of_a_dead_one)


def test_words_that_nobody_reads_hold_no_sandbox_up(portal: BlockingPortal, root: Path) -> None:
    """A sandbox whose first process goes wrong ends, however many before it have said why while nobody listened."""
    with started(portal, root) as engine:
        broken = create(portal, engine, "tiny")
        process = engine._zygotes._warm["tiny"].zygote._process
        assert process is not None and process.stderr is not None
        words = os.open(f"/proc/self/fd/{process.stderr.fileno()}", os.O_WRONLY | os.O_NONBLOCK)
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(words, b"podflare: why\n" * 300)
        os.close(words)
        broken.machine.channel.send(bytes(64))  # no frame
        assert portal.start_task_soon(broken.machine.wait_dead).result(30).reason
        broken.close()


def children_of(pid: int) -> list[int]:
    """Processes that a process with one thread has forked."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_zygotes(engine: ProcessEngine) -> None:
    """SIGKILL the zygotes of this engine, not those of others that tests share, and wait for their end."""
    own = os.getpid()
    children = [int(pid) for pid in Path(f"/proc/{own}/task/{own}/children").read_text().split()]
    for thread in Path(f"/proc/{own}/task").iterdir():
        children += [int(pid) for pid in (thread / "children").read_text().split()]
    bundles = os.fsencode(engine._data)
    zygotes = [pid for pid in set(children) if bundles in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert zygotes
    for pid in zygotes:
        os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(is_running(pid) for pid in zygotes):
        assert time.monotonic() < deadline
        time.sleep(0.005)  # a condition with no event: the children are another thread's to wait for


def is_running(pid: int) -> bool:
    """Whether the process has not ended yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
