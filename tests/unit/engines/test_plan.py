"""The process engine's plans: the security decisions that need no kernel."""

from __future__ import annotations

import json
import resource

import pytest

from podflare.engines.base import Limits, MachineSpec
from podflare.engines.process import plan as planning
from podflare.engines.process.facts import Directory, HostFacts, read_facts
from podflare.wire import plan as wire

LIMITS = Limits(memory_bytes=2**30, disk_bytes=4 * 2**30, max_processes=77)


def facts(*, root: bool, mine: bool = False) -> HostFacts:
    return HostFacts(
        root=root,
        directories=(Directory("/usr", False), Directory("/home/ann/.pyenv/versions/3.11", mine)),
        links=(("/bin", "usr/bin"),),
        etc_copies=("/etc/ssl/certs/ca-certificates.crt",),
        etc_links=(("/etc/alternatives/awk", "/usr/bin/mawk"),),
        python="/home/ann/.pyenv/versions/3.11/bin/python3.11",
        own_packages=("/usr/lib/python3/dist-packages",),
    )


def stage(*, root: bool, map_ids: bool = False, mine: bool = False) -> wire.StagePlan:
    return planning.plan_stage(facts(root=root, mine=mine), stage_dir="/d/stage", machines_dir="/d/m", map_ids=map_ids)


def test_root_daemon_gives_machines_ids_outside_the_hosts_range():
    """A root daemon's machines run under ids that no account of the host has."""
    ids = stage(root=True).ids
    assert ids.first >= 0x7000_0000
    assert ids.first + ids.count < 2**31


def test_an_ordinary_user_maps_only_itself():
    """Without privilege a machine gets the one id that its daemon has, in a namespace of the daemon's own."""
    plan = stage(root=False)
    assert plan.own_user_namespace
    assert plan.ids == wire.IdMap(0, 1)


@pytest.mark.parametrize(("root", "map_ids", "mine", "writable"), [
    (True, True, False, True),
    (True, False, True, False),
    (False, False, True, True),
    (False, False, False, False),
])  # fmt: skip
def test_a_tree_is_writable_only_where_the_machine_has_its_owners_id(root, map_ids, mine, writable):
    """An overlay is planned exactly for trees whose files the machine's root would own."""
    tree = stage(root=root, map_ids=map_ids, mine=mine).trees[1]
    assert tree.writable is writable
    assert tree.map_ids is (root and map_ids)


def test_only_system_directories_and_the_interpreter_are_shown():
    """Nothing of /home, /root, /var or /run of the host is in the stage but the interpreter's own prefix."""
    sources = [tree.source for tree in stage(root=True).trees]
    assert sources == ["/usr", "/home/ann/.pyenv/versions/3.11"]


def test_every_directory_below_a_tree_exists_in_the_skeleton_before_it():
    """Mount points and the directories above them are made parents first."""
    seen = {""}
    for entry in stage(root=False).skeleton:
        assert entry.path.rpartition("/")[0] in seen, entry.path
        seen.add(entry.path)
    assert "/home/ann/.pyenv/versions/3.11" in seen


def test_environment_has_nothing_of_the_daemons(monkeypatch):
    """A secret in the daemon's environment is in no plan."""
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-secret")
    assert b"sk-secret" not in wire.stage_to_json(stage(root=False))


def test_without_a_memory_group_the_repl_is_limited_by_rlimit():
    """Where no control group holds memory, RLIMIT_DATA does."""
    spec = MachineSpec("default", LIMITS)
    bare = planning.plan_machine("m", spec, cgroup_walls=())
    assert (resource.RLIMIT_DATA, 2**30) in bare.repl_rlimits
    assert (resource.RLIMIT_NPROC, 77) in bare.rlimits
    grouped = planning.plan_machine("m", spec, cgroup_walls=("memory_limit", "process_limit"))
    assert dict(grouped.repl_rlimits) == {resource.RLIMIT_NOFILE: planning.MAX_OPEN_FILES}
    assert dict(grouped.rlimits)[resource.RLIMIT_NOFILE] > planning.MAX_OPEN_FILES
    assert resource.RLIMIT_NPROC not in dict(grouped.rlimits)


def test_rlimit_numbers_are_this_platforms():
    """The numbers in the pure plan equal those of the resource module."""
    for name in ("FSIZE", "DATA", "CORE", "NPROC", "NOFILE", "SIGPENDING", "MSGQUEUE"):
        assert getattr(planning, f"RLIMIT_{name}") == getattr(resource, f"RLIMIT_{name}")


def test_plans_survive_the_wire():
    """Encoding and decoding a plan gives an equal plan."""
    plan = stage(root=True, map_ids=True)
    assert wire.stage_from_json(wire.stage_to_json(plan)) == plan
    machine = planning.plan_machine("m", MachineSpec("default", LIMITS), cgroup_walls=(), layers=("l1", "l2"))
    assert wire.machine_from_dict(json.loads(json.dumps(wire.machine_to_dict(machine)))) == machine


def test_facts_of_this_computer_hide_the_daemons_home():
    """The facts read here name no directory of /home, /var or /run but an interpreter's."""
    for directory in read_facts().directories:
        assert not directory.path.startswith(("/var", "/run", "/proc", "/sys", "/etc"))
