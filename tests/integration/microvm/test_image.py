"""Images from real packages: what is in them, that two builds are the same, and the command that makes them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal

import vms
from machines import LIMITS, DrivenMachine
from podflare.engines.base import EngineOptions, MachineSpec
from podflare.engines.microvm.engine import MicrovmEngine
from podflare.engines.microvm.image import recipe
from podflare.engines.microvm.image.build import build, guest_digest
from podflare.engines.microvm.image.recipe import Recipe
from podflare.engines.microvm.image.store import Image, ImageStore
from podflare.engines.templates.definition import parse
from podflare.errors import TemplateFailed, UnknownTemplate
from wheels import make_wheel

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SMALL = ("base-files", "python3", "less")
DEFINITION = b"""
name = "tried"
packages = ["greeting"]
preload = ["greeting"]
[environment]
MODE = "fast"
[files]
"/data/in" = "folder"
"/root/note.txt" = "note.txt"
[programs]
"viewer|less" = "less"
"ghost" = "no-such-package-anywhere"
"""


def podflare(*words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) if path is None else {**os.environ, "PATH": path}
    command = [sys.executable, "-m", "podflare", "image", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def listing(image: Image) -> dict[str, str]:
    """Path in the root -> what `ls -l` shows of it."""
    done = subprocess.run(["unsquashfs", "-lln", str(image.rootfs)], capture_output=True, text=True, check=True)
    rows = [line.split(None, 5) for line in done.stdout.splitlines() if "squashfs-root" in line]
    return {row[5].split(" -> ")[0].removeprefix("squashfs-root/"): " ".join((row[0], row[1], row[5])) for row in rows}


def content(image: Image, path: str) -> bytes:
    return subprocess.run(["unsquashfs", "-cat", str(image.rootfs), path], capture_output=True, check=True).stdout


def take(source: Path, target: Path) -> None:
    try:
        if source.suffix == ".deb":
            target.hardlink_to(source)
            return
    except OSError:
        pass  # another file system
    shutil.copyfile(source, target)


def store_beside(kept: ImageStore, folder: Path) -> ImageStore:
    """An empty store that need not fetch again what is in the cache of `kept`."""
    store = ImageStore(folder)
    store.prepare()
    store.cache.rmdir()
    # apt replaces archives and does not write to them, but it does to what it knows.
    shutil.copytree(kept.cache, store.cache, copy_function=lambda source, target: take(Path(source), Path(target)))
    return store


def build_elsewhere(wanted: Recipe, kept: ImageStore, folder: Path) -> str:
    """The checksum of an image built in a store of its own, where one of the fetched packages is damaged."""
    told: list[float] = []
    store = store_beside(kept, folder)
    victim = next((store.cache / "archives").glob("base-files_*.deb"))
    damaged = bytes(victim.stat().st_size)
    victim.unlink()
    victim.write_bytes(damaged)
    built = build(wanted, store, again=False, tell=lambda step, done: told.append(done))
    assert told == sorted(told) and told[0] == 0 and 0.9 < told[-1] <= 1
    assert not built.cached
    subprocess.run(
        ["unsquashfs", "-q", "-n", "-d", "/tmp/suite_tools/img/e1", str(built.image.rootfs)], stdout=subprocess.DEVNULL
    )
    print(built.image.manifest.files)
    store.verify(built.image)
    shutil.rmtree(store.root)
    return built.image.checksum


def test_what_is_in_the_default_image(image):
    """The root has a shell, Python with compiled modules, accounts and certificates, belongs to root, and is small."""
    found = listing(image)
    for path in ("usr/bin/bash", "usr/bin/python3", "usr/bin/python", "usr/bin/awk", "usr/bin/curl", "etc/passwd"):
        assert path in found, path
    assert found["bin"] == "lrwxrwxrwx 0/0 squashfs-root/bin -> usr/bin"
    assert found["root"].startswith("drwx------ 0/0 ")
    assert found["tmp"].startswith("drwxrwxrwt 0/0 ")
    assert any(path.startswith("usr/lib/python3.") and "/json/__pycache__/decoder.cpython-" in path for path in found)
    assert not any(path.startswith("usr/share/man/") for path in found)
    assert not any(path.startswith(("boot/vmlinuz", "var/lib/dpkg/info/")) for path in found)
    assert {row.split()[1] for row in found.values()} == {"0/0"}
    assert b"root:*:0:0:" in content(image, "etc/passwd")
    assert content(image, "etc/ssl/certs/ca-certificates.crt").count(b"BEGIN CERTIFICATE") > 50
    assert image.kernel.read_bytes()[0x202:0x206] == b"HdrS"
    assert image.vmlinux.read_bytes()[:4] == b"\x7fELF"
    assert image.manifest.size_bytes < 150 * 2**20
    assert image.manifest.guest == guest_digest()


def test_a_template_brings_packages_files_and_settings(image_store, image, tmp_path, portal, data_dir):
    """A template's image has its wheels, files and links to programs, and its machines its variables and imports.

    Another build of it, in another store, is the same byte by byte.
    """
    greeting = {
        "greeting.py": "word = 'hello'\n",
        "greeting-1.0.dist-info/entry_points.txt": "[console_scripts]\ngreet=greeting:word.upper\n",
    }
    make_wheel(tmp_path, "greeting", "1.0", greeting)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a").write_text("data")
    (tmp_path / "folder" / "b").symlink_to("a")
    (tmp_path / "note.txt").write_text("remember")
    before = {name: os.environ.get(name) for name in ("PIP_NO_INDEX", "PIP_FIND_LINKS")}
    os.environ.update(PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tmp_path))
    try:
        wanted = replace(recipe.of(parse(DEFINITION, tmp_path)), packages=SMALL)
        built = build(wanted, image_store, again=True, tell=lambda step, done: None)
        subprocess.run(
            ["unsquashfs", "-q", "-n", "-d", "/tmp/suite_tools/img/e0", str(built.image.rootfs)],
            stdout=subprocess.DEVNULL,
        )
        print(built.image.manifest.files)
        assert build_elsewhere(wanted, image_store, tmp_path / "elsewhere") == built.image.checksum
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    try:
        found = listing(built.image)
        assert content(built.image, "data/in/a") == b"data"
        assert found["data/in/b"].endswith("-> a")
        assert content(built.image, "root/note.txt") == b"remember"
        assert content(built.image, "opt/template/packages/greeting.py") == greeting["greeting.py"].encode()
        assert any(path.startswith("opt/template/packages/__pycache__/greeting.") for path in found)
        assert content(built.image, "opt/template/packages/bin/greet").splitlines()[0] == b"#!/usr/bin/python3"
        record = content(built.image, "opt/template/packages/greeting-1.0.dist-info/RECORD").decode()
        command = hashlib.sha256(content(built.image, "opt/template/packages/bin/greet")).digest()
        assert f"bin/greet,sha256={base64.urlsafe_b64encode(command).decode().rstrip('=')}," in record
        assert found["usr/local/bin/viewer"].endswith("-> /usr/bin/less")
        assert built.image.manifest.missing_programs == ("ghost",)
        assert built.image.manifest.wheels == (("greeting", "1.0"),)
        assert b'"MODE": "fast"' in built.image.initrd.read_bytes()
        assert built.image.rootfs.stat().st_ino != image.rootfs.stat().st_ino
        said = in_a_machine(portal, data_dir, image_store, CELL)
        assert said == "True hello fast /opt/template/packages/greeting.py\n"
    finally:
        image_store.remove("tried")


CELL = """
import os, sys
print('greeting' in sys.modules, end=' ')
import greeting
print(greeting.word, os.environ['MODE'], greeting.__file__)
"""


def in_a_machine(portal: BlockingPortal, folder: Path, store: ImageStore, code: str) -> str:
    """Standard output of a cell in a virtual machine of the template `tried`."""
    vms.skip_without(*vms.PROGRAMS)
    options = EngineOptions(data_dir=str(folder), instance=folder.name, image_dir=str(store.root))
    engine = portal.call(MicrovmEngine, options)
    try:
        portal.call(engine.start)
        machine = portal.call(lambda: engine.create(MachineSpec("tried", LIMITS), timeout_s=200))
        return DrivenMachine(portal, machine).run(code).stdout
    finally:
        portal.call(engine.aclose)


def test_a_template_for_another_python_is_refused(image_store, image):
    """A template that asks for a Python which the distribution does not have is refused, and nothing is left."""
    definition = parse(b'name = "old"\npython = "3.9"', Path())
    with pytest.raises(TemplateFailed, match=r"asks for Python 3\.9, but the distribution's"):
        build(recipe.of(definition), image_store, again=False, tell=lambda step, done: None)
    assert "old" not in image_store.names()
    assert not list((image_store.root / "images").glob("building-*"))


def test_the_command_lists_checks_and_removes(image_store, image, tmp_path):
    """`podflare image` finds a build already done, lists images, finds damage, and removes them."""
    where = ("--image-dir", str(tmp_path / "copy"))
    # Without what was fetched and without the saved machines, whose sparse memory a copy would fill.
    shutil.copytree(image_store.root, tmp_path / "copy", ignore=shutil.ignore_patterns("cache", "origins"))
    done = podflare("build", *where)
    assert (done.returncode, "nothing has changed" in done.stdout) == (0, True), done.stderr
    rows = json.loads(podflare("ls", "--verify", "--json", *where).stdout)
    assert [(row["name"], row["state"], row["sha256"]) for row in rows if row["name"] == "default"] == [
        ("default", "verified", image.checksum)
    ]
    victim = ImageStore(tmp_path / "copy").get("default").initrd
    with victim.open("r+b") as file:
        file.seek(100)
        file.write(b"damage")
    done = podflare("ls", "--verify", *where)
    assert done.returncode == 1 and "initrd is not what was built" in done.stderr and "BROKEN" in done.stdout
    victim.write_bytes(b"cut")
    with pytest.raises(TemplateFailed, match="initrd has 3 bytes instead of"):
        ImageStore(tmp_path / "copy").get("default")
    assert podflare("rm", "default", "--cache", *where).returncode == 0
    assert not (tmp_path / "copy" / "images" / victim.parent.name).exists()
    done = podflare("rm", "default", *where)
    assert (done.returncode, done.stdout) == (1, "") and "no image 'default' has been built" in done.stderr
    with pytest.raises(UnknownTemplate, match="podflare image build --template default makes it"):
        ImageStore(tmp_path / "copy").get("default")


def test_what_is_missing_is_said(tmp_path):
    """Without its tools a build names all that are missing and the packages that have them, in one line, at once."""
    done = podflare("build", "--image-dir", str(tmp_path / "i"), path=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "apt-get, apt-cache, dpkg-deb, sqfstar, lz4" in done.stderr
    assert "apt-get install apt dpkg squashfs-tools lz4" in done.stderr
    assert not (tmp_path / "i").exists()


def test_unknown_packages_and_sources_are_said(image_store, tmp_path):
    """What apt says of a package or a source that does not exist reaches the user in one line."""
    store = ImageStore(tmp_path / "images")
    sources = tmp_path / "sources.list"
    sources.write_text(f"deb [trusted=yes] file:{tmp_path}/nowhere ./\n")
    done = podflare("build", "--image-dir", str(store.root), "--sources", str(sources))
    assert (done.returncode, done.stdout) == (1, "")
    assert "apt-get failed with status 100" in done.stderr and "nowhere" in done.stderr
    assert store.names() == ()
