"""`podflare template`: build, list, show and remove what sandboxes can start from."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.table import Table

from podflare.cli.terminal import console, is_rich, one_line

if TYPE_CHECKING:
    from podflare.engines.templates.store import Manifest, TemplateStore

_FOLDER: Path | None = typer.Option(
    None,
    "--template-dir",
    metavar="DIR",
    help="Where templates are kept; default: PODFLARE_TEMPLATE_DIR, else the user's data directory.",
)
_FIND_LINKS: list[str] = typer.Option(
    [], "--find-links", metavar="DIR|URL", help="Look for packages there, too, as pip does.  Can be repeated."
)
_NAMES: list[str] = typer.Argument(..., metavar="NAME...", help="Built templates.")
_JSON: bool = typer.Option(False, "--json", help="JSON instead of text.")


def make_group() -> typer.Typer:
    """The command group `podflare template`."""
    group = typer.Typer(
        help="Build, list, show and remove templates: what sandboxes can start from.",
        no_args_is_help=True,
        rich_markup_mode="rich" if is_rich(sys.stdout) else None,
    )
    for command in (build, ls, show, rm):
        group.command(command.__name__)(command)
    return group


def build(
    definition: str = typer.Argument(..., metavar="FILE.toml|NAME", help="A definition, or the name of a shipped one."),
    again: bool = typer.Option(False, "--again", help="Build even if nothing changed: with the newest versions."),
    find_links: list[str] = _FIND_LINKS,
    no_index: bool = typer.Option(False, "--no-index", help="Use no package index, only --find-links."),
    from_source: bool = typer.Option(
        False,
        "--from-source",
        help="Also build packages that have no wheel.  DANGER: this runs their code on this computer, outside of any "
        "sandbox, with your rights.",
    ),
    template_dir: Path | None = _FOLDER,
) -> None:
    """Build a template: install its packages, copy its files, start a sandbox of it, put it in place.

    Daemons that run find it at once.  If nothing changed since the last build there is nothing to do.
    """
    from podflare.engines.templates.build import build as build_template
    from podflare.engines.templates.definition import load
    from podflare.engines.templates.pip import Sources
    from podflare.serve import try_template

    wanted = load(definition)
    store = _store(template_dir)
    if from_source:
        _warn("--from-source: code of packages without a wheel runs on this computer now, outside of any sandbox")
    places = tuple(place if "://" in place else str(Path(place).absolute()) for place in find_links)
    with _progress(f"template {wanted.name}") as tell:
        built = build_template(
            wanted,
            store,
            sources=Sources(places, no_index, from_source),
            again=again,
            attempt=lambda scratch, name: try_template(scratch.root, name),
            tell=tell,
        )
    manifest = built.manifest
    for program, package in manifest.missing_programs:
        _warn(f"{program} is not on this computer ({one_line(package)} has it); sandboxes go without")
    if built.cached:
        print(f"{manifest.name} is built already, nothing has changed ({_age(manifest)})")
        return
    packages = f"{len(manifest.packages)} package(s), {manifest.size_bytes >> 20} MiB"
    print(f"{manifest.name} is built: {packages}, Python {manifest.python.version}, {manifest.build_s:.0f} s")
    print(f"podflare run --template {manifest.name} -c 'print(1)'")


def ls(as_json: bool = _JSON, template_dir: Path | None = _FOLDER) -> None:
    """List built templates, and the definitions that come with podflare."""
    from podflare.engines.templates.definition import load, shipped
    from podflare.errors import TemplateFailed
    from podflare.wire.api import TemplateInfo

    store = _store(template_dir)
    found: list[TemplateInfo] = []
    for name in store.names():
        try:
            found.append(store.read(name).info())
        except TemplateFailed as error:
            found.append(TemplateInfo(name, problem=str(error)))
    names = {info.name for info in found}
    unbuilt = [load(name) for name in shipped() if name not in names]
    if as_json:
        rows = [info.to_json() for info in found]
        rows += [TemplateInfo(one.name, one.description, problem="not built").to_json() for one in unbuilt]
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("name", "state", "python", "packages", "size", "description"):
        table.add_column(column)
    for info in found:
        state = "BROKEN" if info.problem else "built"
        size = f"{info.size_bytes >> 20} MiB"
        texts = (info.name, state, info.python, str(len(info.packages)), size, info.problem or info.description)
        table.add_row(*(one_line(text) for text in texts))
    for one in unbuilt:
        table.add_row(one.name, "not built", one.python, "", "", one_line(one.description))
    console().print(table)


def show(
    name: str = typer.Argument(..., help="A built template."),
    as_json: bool = _JSON,
    template_dir: Path | None = _FOLDER,
) -> None:
    """Show one built template: its packages with their versions, limits, and what it lacks."""
    store = _store(template_dir)
    manifest = store.read(name)
    if as_json:
        print(json.dumps({**manifest.info().to_json(), "directory": str(store.tree(manifest))}, indent=2))
        return
    limits = f"{manifest.ram_mib} MiB of memory, {manifest.rootfs_gb} GiB of disk"
    rows = [
        ("name", manifest.name),
        ("description", manifest.description),
        ("built", f"{datetime.fromtimestamp(manifest.built_at_ms / 1000, timezone.utc):%Y-%m-%d %H:%M} UTC"),
        ("python", f"{manifest.python.version} ({manifest.python.executable})"),
        ("limits", limits + ("" if manifest.cpus is None else f", {manifest.cpus:g} cpus")),
        ("network", "none"),
        ("size", f"{manifest.size_bytes >> 20} MiB"),
        ("directory", str(store.tree(manifest))),
        ("preload", " ".join(manifest.preload)),
        ("environment", " ".join(f"{key}={value}" for key, value in manifest.environment)),
        ("files", " ".join((*(target for target, _ in manifest.files), *manifest.folders))),
        ("missing programs", " ".join(f"{program} ({package})" for program, package in manifest.missing_programs)),
        ("packages", " ".join(f"{package}=={version}" for package, version in manifest.packages)),
    ]
    for key, text in rows:
        if text:
            print(f"{key:<17}{one_line(text)}")


def rm(
    names: list[str] = _NAMES,
    template_dir: Path | None = _FOLDER,
) -> None:
    """Remove built templates.  Sandboxes that run live on; the files go when no daemon uses them any more."""
    store = _store(template_dir)
    for name in names:
        store.remove(name)
        print(f"{name} is removed")


def _store(folder: Path | None) -> TemplateStore:
    from podflare.engines.templates.store import TemplateStore
    from podflare.host.config import default_template_dir

    return TemplateStore((folder or default_template_dir(os.environ)).absolute())


def _age(manifest: Manifest) -> str:
    days = int(time.time() - manifest.built_at_ms / 1000) // 86400
    return f"built {days} days ago; --again takes the newest versions" if days else "built today"


def _warn(text: str) -> None:
    print(f"podflare: warning: {text}", file=sys.stderr)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str], None]]:
    """A way to tell what is being done: one moving line on a terminal, else a line for each new step, on stderr."""
    if is_rich(sys.stderr):
        with console(sys.stderr).status(what) as status:
            yield lambda step: status.update(f"{what}: {one_line(step)}")
        return
    said = ""

    def tell(step: str) -> None:
        nonlocal said
        if step != said:
            said = step
            print(f"{what}: {one_line(step)}", file=sys.stderr, flush=True)

    yield tell
