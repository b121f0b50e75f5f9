"""Removing what a machine has left on disk."""

from __future__ import annotations

import os
from pathlib import Path

from podflare.engines.linux.ending import remove_tree


def test_a_tree_is_removed_whatever_is_in_it(tmp_path: Path) -> None:
    """Closed directories, odd names, links out, FIFOs: all go, and nothing that a link leads to."""
    kept = tmp_path / "kept"
    kept.write_text("kept")
    kept.chmod(0o400)
    (tmp_path / "folder").mkdir()
    tree = tmp_path / "tree"
    for name in ("a", "a/b", ".0", "-rf", "new\nline"):
        (tree / name).mkdir(parents=True, exist_ok=True)
        (tree / name / "file").write_text("x")
    (tree / "out").symlink_to(kept)
    (tree / "a" / "folder").symlink_to(tmp_path / "folder")
    os.mkfifo(tree / "a" / "fifo")
    os.link(kept, tree / "hard")
    Path(os.fsdecode(os.fsencode(tree) + b"/\xff")).mkdir()
    for closed in (tree / "a" / "b", tree / "a", tree):
        closed.chmod(0)
    remove_tree(tree)
    remove_tree(tree)
    assert sorted(os.listdir(tmp_path)) == ["folder", "kept"]
    assert kept.read_text() == "kept" and kept.stat().st_mode & 0o777 == 0o400


def test_depth_has_no_end(tmp_path: Path) -> None:
    """Directories nested deeper than a path is long, and than calls may be nested, are removed."""
    here = os.open(".", os.O_RDONLY)
    try:
        (tmp_path / "tree").mkdir()
        os.chdir(tmp_path / "tree")
        for _ in range(1_100):
            os.mkdir("n" * 8)
            os.chdir("n" * 8)
    finally:
        os.fchdir(here)
        os.close(here)
    remove_tree(tmp_path / "tree")
    assert os.listdir(tmp_path) == []
