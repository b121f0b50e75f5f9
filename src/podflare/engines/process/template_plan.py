"""A built template -> the stage of its zygote, pure: the default template's stage with the template's parts in it."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import replace

from podflare.engines.process.facts import HostFacts
from podflare.engines.process.plan import environment, plan_stage
from podflare.engines.templates.definition import PACKAGES
from podflare.engines.templates.store import Manifest
from podflare.wire.plan import SkeletonEntry, StagePlan, Tree


def plan_template(
    facts: HostFacts, manifest: Manifest, tree: str, *, mine: bool, map_ids: bool, **where: str | tuple[bytes, ...]
) -> StagePlan:
    """The stage of a template.

    Args:
        facts: of this computer with the template's interpreter (read_facts).
        tree: the directory with its files.
        mine: the daemon's user owns that.
        where: stage_dir, machines_dir, filters as plan_stage has them.
    """
    base = plan_stage(facts, map_ids=map_ids, preload=manifest.preload, **where)  # type: ignore[arg-type]  # passed on
    writable = map_ids if facts.root else mine
    folders = {PACKAGES: f"{tree}/packages"}
    folders.update({target: f"{tree}/folders/{number}" for number, target in enumerate(manifest.folders)})
    files = tuple(
        SkeletonEntry(target, mode=mode, copy_of=f"{tree}/files/{number}")
        for number, (target, mode) in enumerate(manifest.files)
    )
    known = {entry.path for entry in base.skeleton}
    parents = _missing((*folders, *(posixpath.dirname(target) for target, _ in manifest.files)), known)
    return replace(
        base,
        trees=base.trees
        + tuple(
            Tree(source, target, writable=writable, map_ids=facts.root and map_ids)
            for target, source in folders.items()
        ),
        skeleton=base.skeleton + tuple(SkeletonEntry(path) for path in parents) + files,
        environment=_environment(facts.python, manifest),
        paths=(PACKAGES,),
    )


def _missing(paths: Iterable[str], known: set[str]) -> list[str]:
    """`paths` and the directories above them that are not known, parents first."""
    found: list[str] = []
    for path in paths:
        parts = path.strip("/").split("/") if path != "/" else []
        for depth in range(1, len(parts) + 1):
            current = "/" + "/".join(parts[:depth])
            if current not in known:
                known.add(current)
                found.append(current)
    return found


def _environment(python: str, manifest: Manifest) -> tuple[tuple[str, str], ...]:
    found = dict(environment(python))
    found.update(manifest.environment)
    # For every Python that a machine starts; its REPL has it by StagePlan.paths.
    found["PYTHONPATH"] = PACKAGES
    found["PATH"] = f"{PACKAGES}/bin:{found['PATH']}"
    return tuple(sorted(found.items()))
