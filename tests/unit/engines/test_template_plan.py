"""The stage of a built template: what a machine of it sees, and what it can write to."""

from __future__ import annotations

from dataclasses import replace

import pytest

from podflare.engines.process.facts import Directory, HostFacts, read_facts
from podflare.engines.process.template_plan import plan_template
from podflare.engines.templates.store import Interpreter, Manifest
from podflare.wire import plan as wire

PYTHON = Interpreter("/usr/bin/python3.11", "3.11.2", ("/usr",), ("/usr/lib/python3/dist-packages",))
MANIFEST = Manifest(
    name="mine",
    key="k",
    definition="",
    description="",
    python=PYTHON,
    packages=(("numpy", "2.0"),),
    preload=("numpy",),
    environment=(("MODE", "fast"), ("LANG", "de_DE.UTF-8")),
    files=(("/root/a/notes", 0o644), ("/srv/x", 0o755)),
    folders=("/data/set",),
    missing_programs=(),
)


def facts(*, root: bool) -> HostFacts:
    return HostFacts(
        root=root,
        directories=(Directory("/usr", False),),
        links=(("/bin", "usr/bin"),),
        etc_copies=(),
        etc_links=(),
        python="/usr/bin/python3.11",
        own_packages=("/usr/lib/python3/dist-packages",),
    )


def stage(*, root: bool, mine: bool = True, map_ids: bool = False, manifest: Manifest = MANIFEST) -> wire.StagePlan:
    where = {"stage_dir": "/d/stage", "machines_dir": "/d/m", "filters": (b"x",)}
    return plan_template(facts(root=root), manifest, "/t/trees/k", mine=mine, map_ids=map_ids, **where)


@pytest.mark.parametrize(("root", "mine", "map_ids", "writable"), [
    (True, True, True, True), (True, True, False, False), (False, True, False, True), (False, False, False, False),
])  # fmt: skip
def test_trees_are_private_copies_or_read_only(root: bool, mine: bool, map_ids: bool, writable: bool) -> None:
    """Packages and directories are overlays where the machine's root owns their files, else read-only mounts."""
    trees = stage(root=root, mine=mine, map_ids=map_ids).trees[1:]
    assert [(tree.source, tree.target) for tree in trees] == [
        ("/t/trees/k/packages", "/opt/template/packages"),
        ("/t/trees/k/folders/0", "/data/set"),
    ]
    assert {tree.writable for tree in trees} == {writable}


def test_mount_points_and_files_have_their_directories() -> None:
    """Every directory above what a template brings exists before it, in order."""
    seen = {""}
    for entry in stage(root=False).skeleton:
        assert entry.path.rpartition("/")[0] in seen, entry.path
        seen.add(entry.path)
    assert {"/opt/template/packages", "/data/set", "/root/a/notes", "/srv/x"} <= seen
    files = {entry.path: entry.copy_of for entry in stage(root=False).skeleton if entry.copy_of}
    assert {entry.mode for entry in stage(root=False).skeleton if entry.path == "/srv/x"} == {0o755}
    assert files == {"/root/a/notes": "/t/trees/k/files/0", "/srv/x": "/t/trees/k/files/1"}


def test_packages_are_the_templates_own() -> None:
    """sys.path has the template's packages alone, those of the computer are hidden, subprocesses find the same."""
    plan = stage(root=False)
    environment = dict(plan.environment)
    assert plan.paths == ("/opt/template/packages",)
    assert plan.hide == ("/usr/lib/python3/dist-packages",)
    assert environment["PYTHONPATH"] == "/opt/template/packages"
    assert environment["PATH"].startswith("/opt/template/packages/bin:/usr/local/sbin:")
    assert (environment["MODE"], environment["LANG"]) == ("fast", "de_DE.UTF-8")


def test_the_largest_template_fits_into_one_packet() -> None:
    """A definition with as many files as it may have still makes a plan that the zygote can read."""
    from podflare.engines.templates.definition import MAX_FILES

    many = tuple((f"/srv/{number:04}{'x' * 390}", 0o644) for number in range(MAX_FILES))
    filters = (b"\0" * 8192, b"\0" * 8192)
    where = {"stage_dir": "/d/stage", "machines_dir": "/d/m", "filters": filters}
    manifest = replace(MANIFEST, files=many)
    plan = plan_template(read_facts(), manifest, "/t/" + "y" * 200, mine=True, map_ids=False, **where)
    assert len(wire.stage_to_json(plan)) < 192 * 1024


def test_facts_are_those_of_the_templates_interpreter() -> None:
    """An interpreter elsewhere adds its own directory, and only directories that are shown can be hidden."""
    python = Interpreter("/opt/py/bin/python3.13", "3.13.1", ("/etc",), ("/etc/ssl", "/nowhere/site"))
    found = read_facts(python)
    assert found.python == "/opt/py/bin/python3.13"
    assert "/etc" in {directory.path for directory in found.directories}
    assert found.own_packages == ("/etc/ssl",)
