"""Random programs over a tree of real sandboxes, each held against a model of what it must see.

A failure prints the program that led to it, shortened: the rules that were called, and under each the cell that it ran.
"""

from __future__ import annotations

import base64
import copy
import json
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule, run_state_machine_as_test

from daemons import ServedDaemon, served
from podflare import Client, Sandbox, SandboxNotFound, close_default_client

MAX_SANDBOXES = 8
MAX_GENERATION = 20
FOLDERS = ("/root", "/root/d", "/root/e", "/tmp/t")
PATHS = ("/root/f", "/root/g", "/root/d/f", "/tmp/t/f", "f", "../g")
NAMES = ("x", "y")
HANDLES = ("h", "i", "j")
FLAGS = {
    "read": "os.O_RDONLY",
    "update": "os.O_RDWR",
    "append": "os.O_RDWR | os.O_APPEND",
    "new": "os.O_RDWR | os.O_TRUNC",
}
PROLOGUE = """
import base64, itertools, json, mmap, os, shutil, sqlite3
for name in os.listdir("/root"): os.unlink(f"/root/{name}")  # an image may have something there
os.mkdir("/root/d"); os.mkdir("/tmp/t"); open("/root/f", "w").write("first"); open("/root/d/f", "w").write("second")
h = os.open("/root/f", os.O_RDWR)
shared = mmap.mmap(-1, 4096)
db = sqlite3.connect("/tmp/db"); db.execute("create table t(x)"); db.commit()
counter = itertools.count()
def look():
    files, folders = {}, []
    for top in ("/root", "/tmp/t"):
        for folder, _, names in os.walk(top):
            folders.append(folder)
            for name in names:
                with open(f"{folder}/{name}", "rb") as file: files[f"{folder}/{name}"] = file.read().decode()
    handles = {}
    for name in "hij":
        if name in globals():
            fd = globals()[name]
            handles[name] = [os.lseek(fd, 0, os.SEEK_CUR), os.pread(fd, 4096, 0).decode()]
    print(json.dumps({
        "values": {name: globals()[name] for name in "xy" if name in globals()},
        "same": "x" in globals() and "y" in globals() and x is y,
        "environment": {key: value for key, value in os.environ.items() if key.startswith("MODEL_")},
        "folder": os.getcwd(), "files": files, "folders": sorted(folders), "handles": handles,
        "rows": [row[0] for row in db.execute("select x from t order by rowid")], "shared": shared[:4].decode(),
    }, sort_keys=True))
"""


@dataclass
class Inode:
    data: bytearray = field(default_factory=bytearray)


@dataclass
class Description:
    """An open file description: what descriptors made by dup share."""

    inode: Inode
    append: bool
    writes: bool
    offset: int = 0


@dataclass
class World:
    """What one sandbox must see."""

    values: dict[str, list[int]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/root"
    folders: set[str] = field(default_factory=lambda: {"/root", "/root/d", "/tmp/t"})
    files: dict[str, Inode] = field(
        default_factory=lambda: {"/root/f": Inode(bytearray(b"first")), "/root/d/f": Inode(bytearray(b"second"))}
    )
    handles: dict[str, Description] = field(default_factory=dict)
    rows: list[int] = field(default_factory=list)
    shared: bytearray = field(default_factory=lambda: bytearray(4))
    counter: int = 0
    generation: int = 0

    def __post_init__(self) -> None:
        self.handles["h"] = Description(self.files["/root/f"], append=False, writes=True)

    def place(self, path: str) -> str | None:
        """The absolute form of a path whose directory exists, and which is none itself."""
        whole = posixpath.normpath(posixpath.join(self.folder, path))
        fits = posixpath.dirname(whole) in self.folders and whole not in self.folders
        return whole if fits else None

    def look(self) -> dict[str, object]:
        """What look() prints in the sandbox."""
        x, y = (self.values.get(name) for name in NAMES)
        return {
            "values": self.values,
            "same": x is not None and x is y,
            "environment": self.environment,
            "folder": self.folder,
            "files": {path: inode.data.decode() for path, inode in self.files.items()},
            "folders": sorted(self.folders),
            "handles": {name: [one.offset, one.inode.data.decode()] for name, one in self.handles.items()},
            "rows": self.rows,
            "shared": self.shared.decode(),
        }


@dataclass(eq=False)
class Branch:
    """A sandbox and its model."""

    sandbox: Sandbox
    world: World
    number: int

    def __repr__(self) -> str:
        return f"branch{self.number}"

    def run(self, code: str) -> str:
        note(f"    {self!r}: {code}")
        result = self.sandbox.run_code(code)
        assert result.ok and not result.stderr, f"{self!r}: {code}\n{result.stderr}"
        return result.stdout

    def check(self) -> None:
        seen = json.loads(self.sandbox.run_code("look()").stdout)
        expected = json.loads(json.dumps(self.world.look()))
        assert seen == expected, f"{self!r} differs"


class Family(RuleBasedStateMachine):
    """Each rule does one thing in one branch, in the sandbox and in its model; what cannot be done there is left out."""

    branches = Bundle("branches")
    client: Client

    def __init__(self) -> None:
        super().__init__()
        self.living: list[Branch] = []
        self.gone: list[str] = []
        self.made = 0

    def take(self, sandbox: Sandbox, world: World) -> Branch:
        self.made += 1
        self.living.append(Branch(sandbox, world, self.made))
        return self.living[-1]

    def teardown(self) -> None:
        try:
            for branch in self.living:
                branch.check()
            for sandbox_id in self.gone:
                with pytest.raises(SandboxNotFound):
                    self.client.get_sandbox(sandbox_id)
            assert {info.id for info in self.client.list_sandboxes()} == {one.sandbox.id for one in self.living}
        finally:
            for branch in self.living:
                with suppress(SandboxNotFound):
                    branch.sandbox.close()

    # The tree.

    @rule(target=branches)
    def create(self):
        if len(self.living) >= MAX_SANDBOXES:
            return multiple()
        branch = self.take(Sandbox(client=self.client), World())
        branch.run(PROLOGUE)
        return branch

    @rule(target=branches, parent=branches, count=st.integers(1, 3))
    def fork(self, parent, count):
        if len(self.living) + count > MAX_SANDBOXES or parent.world.generation >= MAX_GENERATION:
            return multiple()
        children = []
        for sandbox in parent.sandbox.fork(count):
            world = copy.deepcopy(parent.world)
            world.generation += 1
            children.append(self.take(sandbox, world))
        return multiple(*children)

    @rule(branch=consumes(branches))
    def close(self, branch):
        branch.check()
        branch.sandbox.close()
        self.leave(branch)

    @rule(heir=branches, winner=consumes(branches))
    def merge(self, heir, winner):
        if heir is winner:
            self.close(winner)
            return
        heir.sandbox.merge_into(winner.sandbox)
        heir.world = winner.world
        self.leave(winner)

    def leave(self, branch: Branch) -> None:
        self.living.remove(branch)
        self.gone.append(branch.sandbox.id)

    # Memory.

    @rule(branch=branches, name=st.sampled_from(NAMES), value=st.integers(0, 9))
    def assign(self, branch, name, value):
        branch.run(f"{name} = [{value}]")
        branch.world.values[name] = [value]

    @rule(branch=branches, to=st.sampled_from(NAMES), of=st.sampled_from(NAMES))
    def alias(self, branch, to, of):
        if of in branch.world.values:
            branch.run(f"{to} = {of}")
            branch.world.values[to] = branch.world.values[of]

    @rule(branch=branches, name=st.sampled_from(NAMES), value=st.integers(0, 9))
    def mutate(self, branch, name, value):
        if name in branch.world.values:
            branch.run(f"{name}.append({value})")
            branch.world.values[name].append(value)

    @rule(branch=branches, name=st.sampled_from(NAMES))
    def delete(self, branch, name):
        if branch.world.values.pop(name, None) is not None:
            branch.run(f"del {name}")

    @rule(branch=branches)
    def count(self, branch):
        assert branch.run("print(next(counter))") == str(branch.world.counter)
        branch.world.counter += 1

    @rule(branch=branches, value=st.integers(0, 9))
    def insert(self, branch, value):
        branch.run(f"db.execute('insert into t values ({value})'); db.commit()")
        branch.world.rows.append(value)

    @rule(branch=branches, at=st.integers(0, 3), letter=st.sampled_from("abc"))
    def poke(self, branch, at, letter):
        branch.run(f"shared[{at}:{at + 1}] = b'{letter}'")
        branch.world.shared[at : at + 1] = letter.encode()

    @rule(branch=branches, key=st.sampled_from(["MODEL_A", "MODEL_B"]), value=st.sampled_from("123"))
    def set_environment(self, branch, key, value):
        branch.run(f"os.environ[{key!r}] = {value!r}")
        branch.world.environment[key] = value

    @rule(branch=branches, key=st.sampled_from(["MODEL_A", "MODEL_B"]))
    def unset_environment(self, branch, key):
        branch.run(f"os.environ.pop({key!r}, None)")
        branch.world.environment.pop(key, None)

    # Files.

    @rule(branch=branches, path=st.sampled_from(PATHS), data=st.sampled_from(["", "one", "three\n"]))
    def write(self, branch, path, data):
        if place := branch.world.place(path):
            branch.run(f"open({path!r}, 'w').write({data!r})")
            branch.world.files.setdefault(place, Inode()).data[:] = data.encode()

    @rule(branch=branches, path=st.sampled_from(PATHS), data=st.sampled_from(["+", "more"]))
    def append(self, branch, path, data):
        if place := branch.world.place(path):
            branch.run(f"open({path!r}, 'a').write({data!r})")
            branch.world.files.setdefault(place, Inode()).data += data.encode()

    @rule(branch=branches, path=st.sampled_from(PATHS))
    def unlink(self, branch, path):
        place = branch.world.place(path)
        if place in branch.world.files:
            branch.run(f"os.unlink({path!r})")
            del branch.world.files[place]

    @rule(branch=branches, old=st.sampled_from(PATHS), new=st.sampled_from(PATHS), link=st.booleans())
    def rename_or_link(self, branch, old, new, link):
        files = branch.world.files
        source, target = branch.world.place(old), branch.world.place(new)
        same_file = source in files and target in files and files[source] is files[target]
        across = "/tmp" in (source or "")[:4] or "/tmp" in (target or "")[:4]
        if source not in files or target is None or same_file or (link and (target in files or across)):
            return
        branch.run(f"os.{'link' if link else 'rename'}({old!r}, {new!r})")
        files[target] = files[source]
        if not link:
            del files[source]

    @rule(branch=branches, path=st.sampled_from(FOLDERS))
    def make_folder(self, branch, path):
        world = branch.world
        above = posixpath.dirname(path)
        if path not in world.folders and (above in world.folders or above == "/tmp"):
            branch.run(f"os.mkdir({path!r})")
            world.folders.add(path)

    @rule(branch=branches, path=st.sampled_from(FOLDERS[1:]))
    def remove_folder(self, branch, path):
        world = branch.world
        inside = [other for other in (*world.files, *world.folders, world.folder + "/") if other.startswith(path + "/")]
        if path in world.folders and not inside:
            branch.run(f"os.rmdir({path!r})")
            world.folders.remove(path)

    @rule(branch=branches, old=st.sampled_from(FOLDERS[1:]), new=st.sampled_from(FOLDERS[1:]))
    def move_folder(self, branch, old, new):
        world = branch.world
        moved = {path: inode for path, inode in world.files.items() if path.startswith(old + "/")}
        held = [inode for inode in moved.values() for one in world.handles.values() if one.inode is inode]
        linked = len({id(inode) for inode in world.files.values()}) < len(world.files)
        if old not in world.folders or new in world.folders or world.folder == old or held or linked:
            return  # to move what lies in a fork's lower layer is to copy it
        branch.run(f"shutil.move({old!r}, {new!r})")
        world.folders = {new if path == old else path for path in world.folders}
        world.files = {new + path[len(old) :] if path in moved else path: inode for path, inode in world.files.items()}

    @rule(branch=branches, path=st.sampled_from(FOLDERS))
    def change_folder(self, branch, path):
        if path in branch.world.folders:
            branch.run(f"os.chdir({path!r})")
            branch.world.folder = path

    # Open files.

    @rule(
        branch=branches,
        handle=st.sampled_from(HANDLES),
        path=st.sampled_from(PATHS),
        how=st.sampled_from(sorted(FLAGS)),
    )
    def open(self, branch, handle, path, how):
        inode = branch.world.files.get(branch.world.place(path) or "")
        if inode is None or handle in branch.world.handles:
            return
        branch.run(f"{handle} = os.open({path!r}, {FLAGS[how]})")
        if how == "new":
            inode.data.clear()
        branch.world.handles[handle] = Description(inode, append=how == "append", writes=how != "read")

    @rule(branch=branches, new=st.sampled_from(HANDLES), old=st.sampled_from(HANDLES))
    def duplicate(self, branch, new, old):
        handles = branch.world.handles
        if old in handles and new not in handles:
            branch.run(f"{new} = os.dup({old})")
            handles[new] = handles[old]

    @rule(branch=branches, handle=st.sampled_from(HANDLES), size=st.integers(1, 4))
    def read_on(self, branch, handle, size):
        if one := branch.world.handles.get(handle):
            data = bytes(one.inode.data[one.offset : one.offset + size])
            assert base64.b64decode(branch.run(f"print(base64.b64encode(os.read({handle}, {size})).decode())")) == data
            one.offset += len(data)

    @rule(branch=branches, handle=st.sampled_from(HANDLES), data=st.sampled_from(["w", "wrote"]))
    def write_on(self, branch, handle, data):
        one = branch.world.handles.get(handle)
        if one is None or not one.writes:
            return
        branch.run(f"os.write({handle}, b'{data}')")
        content = one.inode.data
        if one.append:
            one.offset = len(content)
        content.extend(bytes(max(0, one.offset - len(content))))
        content[one.offset : one.offset + len(data)] = data.encode()
        one.offset += len(data)

    @rule(branch=branches, handle=st.sampled_from(HANDLES), to=st.integers(0, 6))
    def seek(self, branch, handle, to):
        if one := branch.world.handles.get(handle):
            branch.run(f"os.lseek({handle}, {to}, os.SEEK_SET)")
            one.offset = to

    @rule(branch=branches, handle=st.sampled_from(HANDLES))
    def close_handle(self, branch, handle):
        if branch.world.handles.pop(handle, None):
            branch.run(f"os.close({handle}); del {handle}")


@pytest.fixture(scope="module")
def model_daemon(private_temp: Path, serve_words: tuple[str, ...]) -> Iterator[ServedDaemon]:
    """One daemon for all programs."""
    folder = Path(tempfile.mkdtemp(prefix="m", dir=private_temp))
    folder.chmod(0o711)
    with served(folder, *serve_words) as daemon:
        yield daemon
    shutil.rmtree(folder)


@pytest.fixture
def check_family(model_daemon: ServedDaemon) -> Iterator[Callable[..., None]]:
    """check_family(**settings): run programs."""

    def check(**chosen: object) -> None:
        run_state_machine_as_test(
            Family,
            settings=settings(
                deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=True, **chosen
            ),
        )

    with Client(host=model_daemon.url) as client:
        Family.client = client
        yield check
    close_default_client()  # connections are kept for the next client of the same address


@pytest.mark.both_engines
@pytest.mark.timeout(300)
def test_branches_see_what_the_model_says(check_family, engine_name):
    """Programs of assignments, files, open files, forks, merges and closes do in each branch what they do in a model."""
    examples, steps = (12, 30) if engine_name == "process" else (2, 20)
    check_family(max_examples=examples, stateful_step_count=steps, derandomize=True)


@pytest.mark.any_engine
@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_many_more_branches_see_what_the_model_says(check_family):
    """The same with many, longer and other programs at each run."""
    check_family(max_examples=600, stateful_step_count=60)
