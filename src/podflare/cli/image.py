"""`podflare image`: build, list and remove what virtual machines boot."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.table import Table

from podflare.cli.terminal import console, is_rich, one_line

if TYPE_CHECKING:
    from podflare.serve import ImageStore

_FOLDER: Path | None = typer.Option(
    None,
    "--image-dir",
    metavar="DIR",
    help="Where images are kept; default: PODFLARE_IMAGE_DIR, else the user's data directory.",
)
_NAMES: list[str] = typer.Argument(None, metavar="[NAME]...", help="Built images.")
_SOURCES: Path | None = typer.Option(
    None,
    "--sources",
    metavar="FILE",
    help="Package sources of Debian to use instead of this computer's, in the format of sources.list.",
)


def make_group() -> typer.Typer:
    """The command group `podflare image`."""
    group = typer.Typer(
        help="Build, list and remove images: what virtual machines boot.",
        no_args_is_help=True,
        rich_markup_mode="rich" if is_rich(sys.stdout) else None,
    )
    for command in (build, ls, rm):
        group.command(command.__name__)(command)
    return group


def build(
    template: str = typer.Option(
        "default",
        "--template",
        metavar="NAME|FILE.toml",
        help="Template whose image is built: default, or a definition.",
    ),
    again: bool = typer.Option(False, "--again", help="Build even if nothing changed: with the newest packages."),
    sources: Path | None = _SOURCES,
    image_dir: Path | None = _FOLDER,
) -> None:
    """Build an image: kernel, initramfs and root file system, from packages of Debian that apt fetches and checks.

    Needs no privilege.  If nothing changed since the last build there is nothing to do.
    """
    from podflare.serve import build_image

    where = None if sources is None else sources.absolute()
    with _progress(f"image {one_line(template)}") as tell:
        built = build_image(template, _store(image_dir), again=again, tell=tell, sources=where)
    image = built.image
    if built.cached:
        print(f"{image.name} is built already, nothing has changed; --again takes the newest packages")
        return
    manifest = image.manifest
    print(
        f"{image.name} is built: {manifest.size_bytes >> 20} MiB, kernel {manifest.kernel}, Python {manifest.python}, "
        f"{manifest.build_s:.0f} s"
    )
    print(f"sha256 {image.checksum}")


def ls(
    as_json: bool = typer.Option(False, "--json", help="JSON instead of text."),
    verify: bool = typer.Option(False, "--verify", help="Compare every file with its checksum."),
    image_dir: Path | None = _FOLDER,
) -> None:
    """List built images.  Exit code 1 if one of them is broken."""
    store = _store(image_dir)
    rows = [_describe(store, name, verify) for name in store.names()]
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for column in ("name", "state", "built", "size", "kernel", "python", "sha256"):
            table.add_column(column)
        for row in rows:
            texts = (
                row["name"],
                row["state"],
                row["built"],
                row["size"],
                row["kernel"],
                row["python"],
                row["sha256"][:16],
            )
            table.add_row(*(one_line(text) for text in texts))
        console().print(table)
        for row in rows:
            if row["problem"]:
                print(one_line(row["problem"]), file=sys.stderr)
    raise typer.Exit(1 if any(row["problem"] for row in rows) else 0)


def _describe(store: ImageStore, name: str, verify: bool) -> dict[str, Any]:
    from podflare.errors import TemplateFailed

    row: dict[str, Any] = dict.fromkeys(("built", "size", "kernel", "python", "sha256", "problem", "directory"), "")
    try:
        image = store.get(name)
        if verify:
            store.verify(image)
    except TemplateFailed as error:
        return {"name": name, "state": "BROKEN", **row, "problem": str(error)}
    manifest = image.manifest
    row.update(
        built=f"{datetime.fromtimestamp(manifest.built_at_ms / 1000, timezone.utc):%Y-%m-%d %H:%M} UTC",
        size=f"{manifest.size_bytes >> 20} MiB",
        kernel=manifest.kernel,
        python=manifest.python,
        sha256=image.checksum,
        directory=str(image.directory),
    )
    return {"name": name, "state": "verified" if verify else "built", **row}


def rm(
    names: list[str] = _NAMES,
    cache: bool = typer.Option(False, "--cache", help="Also remove the packages that builds have fetched."),
    image_dir: Path | None = _FOLDER,
) -> None:
    """Remove built images.  Sandboxes that run live on; the files go when no daemon uses them any more."""
    store = _store(image_dir)
    if not names and not cache:
        raise typer.BadParameter("name an image, or say --cache")
    for name in names or ():
        store.remove(name)
        print(f"{name} is removed")
    if cache:
        store.clear_cache()
        print("the cache is empty")


def _store(folder: Path | None) -> ImageStore:
    from podflare.host.config import default_image_dir
    from podflare.serve import image_store

    return image_store(folder or default_image_dir(os.environ))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[str, float], None]]:
    """A way to tell what is being done: a bar on a terminal, else a line for each new step, on stderr."""
    if is_rich(sys.stderr):
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
        with Progress(*columns, console=console(sys.stderr), transient=True) as bar:
            task = bar.add_task(what, total=1.0)
            yield lambda step, done: bar.update(task, description=f"{what}: {one_line(step)}", completed=done)
        return
    said = ""

    def tell(step: str, done: float) -> None:
        nonlocal said
        if step != said:
            said = step
            print(f"{what}: {one_line(step)}", file=sys.stderr, flush=True)

    yield tell
