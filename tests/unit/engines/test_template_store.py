"""Where templates are kept: who may, what is damaged, and that a name always means a whole template."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from podflare.engines.templates.interpreters import ask, find
from podflare.engines.templates.pip import explain
from podflare.engines.templates.store import Interpreter, Manifest, TemplateStore, decode, encode
from podflare.errors import TemplateFailed, UnknownTemplate

MANIFEST = Manifest(
    name="mine",
    key="k1",
    definition="d",
    description="what for",
    python=Interpreter("/bin/sh", "3.11.2", ("/usr",), ()),
    packages=(("a", "1"), ("b", "2")),
    preload=("a",),
    environment=(("A", "b"),),
    files=(("/x", 0o644),),
    folders=("/y",),
    missing_programs=(("rg", "ripgrep"),),
    cpus=0.5,
)


@pytest.fixture
def store(tmp_path: Path) -> TemplateStore:
    """An empty store."""
    made = TemplateStore(tmp_path / "store")
    made.prepare()
    return made


def put(store: TemplateStore, manifest: Manifest = MANIFEST) -> None:
    """A template in the store, as a build publishes it."""
    scratch = TemplateStore(store.root / "building-x")
    scratch.prepare()
    (scratch.root / "lock").touch()
    scratch.tree(manifest).mkdir()
    (scratch.tree(manifest) / "lock").touch()
    store.publish(manifest, scratch)


def test_a_manifest_survives_its_file() -> None:
    """Encoding and decoding gives an equal manifest."""
    assert decode(encode(MANIFEST)) == MANIFEST


def test_a_published_template_is_found(store: TemplateStore) -> None:
    """It is listed and read back as it was; the build's own folder is gone."""
    assert store.names() == ()
    put(store)
    assert store.names() == ("mine",)
    assert store.read("mine") == MANIFEST
    assert list(store.root.glob("building-*")) == []


def test_no_directory_is_no_templates(tmp_path: Path) -> None:
    """A store that nobody made yet is empty, and asking it makes nothing."""
    store = TemplateStore(tmp_path / "none")
    assert store.names() == ()
    with pytest.raises(UnknownTemplate):
        store.read("mine")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["../mine", "a/b", ".hidden", "x\0y", "", "x" * 300])
def test_names_lead_nowhere_else(store: TemplateStore, name: str) -> None:
    """A name with path parts, or one that no file can have, is unknown."""
    put(store)
    with pytest.raises((UnknownTemplate, TemplateFailed)):
        store.read(name)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"format": 99}', b"[" * 100_000, b"\xff"])
def test_a_damaged_manifest_is_told(store: TemplateStore, content: bytes) -> None:
    """Whatever is wrong with a manifest, the error names the template and says to build it again."""
    put(store)
    (store.root / "mine.json").write_bytes(content)
    with pytest.raises(TemplateFailed, match=r"'mine'.*build it again"):
        store.read("mine")


def test_a_manifest_cannot_name_a_tree_elsewhere(store: TemplateStore) -> None:
    """A key that is a path is damage."""
    put(store)
    store.put(replace(MANIFEST, key="../../etc"))
    with pytest.raises(TemplateFailed, match="damaged"):
        store.read("mine")


@pytest.mark.parametrize("what", [".", "mine.json", "trees/k1"])
def test_what_others_can_write_to_is_refused(store: TemplateStore, what: str) -> None:
    """A template whose directory, manifest or tree others may change is not used, and the error says why."""
    put(store)
    path = store.root / what
    path.chmod(path.stat().st_mode | 0o002)
    with pytest.raises(TemplateFailed, match="can be written to by others"):
        store.read("mine")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_another_users_templates_are_refused(store: TemplateStore) -> None:
    """Root uses no template of an ordinary user."""
    put(store)
    os.chown(store.root, 12345, 12345)
    with pytest.raises(TemplateFailed, match="belongs to another user"):
        store.read("mine")


def test_a_lost_tree_and_a_lost_interpreter_are_told(store: TemplateStore) -> None:
    """Both errors name what is gone."""
    put(store, replace(MANIFEST, python=replace(MANIFEST.python, executable="/no/such/python")))
    with pytest.raises(TemplateFailed, match="/no/such/python, which is gone"):
        store.read("mine")
    (store.root / "trees" / "k1" / "lock").unlink()
    (store.root / "trees" / "k1").rmdir()
    with pytest.raises(TemplateFailed, match="lost its files"):
        store.read("mine")


def test_an_old_tree_goes_when_nobody_holds_it(store: TemplateStore) -> None:
    """A rebuilt template's old tree stays while a daemon holds it, and goes with the next change after that."""
    put(store)
    held = store.hold(MANIFEST)
    put(store, replace(MANIFEST, key="k2"))
    assert store.read("mine").key == "k2"
    assert store.tree(MANIFEST).exists()
    os.close(held)
    put(store, replace(MANIFEST, key="k3"))
    assert sorted(path.name for path in (store.root / "trees").iterdir()) == ["k3"]


def test_remove_forgets_and_cleans_up(store: TemplateStore) -> None:
    """A removed template is unknown and its files are gone; removing what is not there says what is."""
    put(store)
    with pytest.raises(UnknownTemplate, match=r"other.*built: mine"):
        store.remove("other")
    store.remove("mine")
    assert store.names() == () and list((store.root / "trees").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ERROR: No matching distribution found for nosuch", "no nosuch with a wheel for Python 3.11"),
        (
            (
                "ERROR: Could not find a version that satisfies the requirement numpy==99 (from versions: 1.0, 2.0)\n"
                "ERROR: No matching distribution found for numpy==99"
            ),
            "no version of numpy==99 fits: with a wheel for Python 3.11 there are 1.0, 2.0",
        ),
        (
            (
                "WARNING: Retrying ... NewConnectionError('Failed to establish a new connection')\n"
                "ERROR: No matching distribution found for numpy"
            ),
            "the package index cannot be reached",
        ),
        (
            "The conflict:\n    The user requested a==1\n    b 2 depends on a>=2\nERROR: ResolutionImpossible: x",
            "contradict each other: The user requested a==1; b 2 depends on a>=2",
        ),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES", "hash differs"),
        ("ERROR: something new", "pip failed: something new"),
        ("", "without a word"),
    ],
)
def test_pips_failures_in_words(text: str, said: str) -> None:
    """Each way in which pip fails has its own explanation."""
    assert said in explain(text, "3.11")


def test_interpreters_are_found_or_told(tmp_path: Path) -> None:
    """The running interpreter is found by its version, and what is none or too old is refused by name."""
    own = find("")
    assert own == ask(own.executable) and own.version.startswith("3.")
    assert find(".".join(own.version.split(".")[:2])) == own
    with pytest.raises(TemplateFailed, match=r"Python 3\.99 is not installed"):
        find("3.99")
    with pytest.raises(TemplateFailed, match="does not work"):
        find("/bin/true")
    with pytest.raises(TemplateFailed, match="does not work"):
        find(str(tmp_path / "none"))
