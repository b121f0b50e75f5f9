"""Template definitions: what is taken, and that anything else is refused with its name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podflare.engines.templates.definition import Definition, check_name, load, parse, shipped
from podflare.errors import BadRequest

HERE = Path("/somewhere")
FULL = b"""
name = "mine"
description = "what it is for"
python = "3.11"
packages = ["numpy>=2,<3", "pandas[excel,parquet]", "tomli; python_version < '3.11'"]
preload = ["numpy", "scipy.stats"]
network = false
[environment]
MODE = "fast"
[files]
"/root/notes.txt" = "notes.txt"
"/data" = "set/"
[programs]
"fd|fdfind" = "fd-find"
[limits]
ram_mib = 512
rootfs_gb = 2
cpus = 1.5
"""


def test_every_key_is_read() -> None:
    """A definition that uses every key comes out as written."""
    assert parse(FULL, HERE) == Definition(
        name="mine",
        description="what it is for",
        python="3.11",
        packages=("numpy>=2,<3", "pandas[excel,parquet]", "tomli; python_version < '3.11'"),
        preload=("numpy", "scipy.stats"),
        environment=(("MODE", "fast"),),
        files=(("/root/notes.txt", "notes.txt"), ("/data", "set/")),
        programs=(("fd|fdfind", "fd-find"),),
        ram_mib=512,
        rootfs_gb=2,
        cpus=1.5,
        folder=HERE,
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("name = 'default'", "needs no building"),
        ("name = '../x'", "no name for a template"),
        ("name = 'a/b'", "no name for a template"),
        ("name = 'A'", "no name for a template"),
        ("name = '.x'", "no name for a template"),
        ("name = 7", "'name' must be text"),
        ("name = ", "not TOML"),
        ("nam = 'x'", "unknown key 'nam'"),
        ("packages = 'numpy'", "'packages' must be a list"),
        ("packages = ['--index-url=http://evil']", "is not a requirement"),
        ("packages = ['-r x']", "is not a requirement"),
        ("packages = ['x @ file:///etc']", "is not a requirement"),
        ("packages = ['git+https://host/x']", "is not a requirement"),
        ("packages = ['./local']", "is not a requirement"),
        ("packages = ['a\\nb']", "is not a requirement"),
        ("preload = ['os; evil()']", "is not a module's name"),
        ("preload = ['..x']", "is not a module's name"),
        ("python = 'pypy'", "'python' must be a version"),
        ("network = true", "no network"),
        ("environment = {'A=B' = 'x'}", "is not a variable's name"),
        ("environment = {PATH = '/x'}", "PATH is podflare's to set"),
        ("environment = {A = 1}", "value of A must be text"),
        ("files = {'etc/x' = 'x'}", "is not an absolute path"),
        ("files = {'/etc/../x' = 'x'}", "without . and .."),
        ("files = {'//etc/x' = 'x'}", "without . and .."),
        ("files = {'/usr/bin/x' = 'x'}", "cannot put files"),
        ("files = {'/proc/x' = 'x'}", "cannot put files"),
        ("files = {'/machines/x' = 'x'}", "cannot put files"),
        ("files = {'/opt/template/packages/x.py' = 'x'}", "cannot put files"),
        ("files = {'/a' = 'x', '/a-b' = 'y', '/a/c' = 'z'}", "lies inside"),
        ("programs = {'rm -rf' = 'x'}", "is not a program's name"),
        ("limits = {ram_mib = 1}", "'limits.ram_mib'"),
        ("limits = {ram_mib = true}", "'limits.ram_mib'"),
        ("limits = {cpus = 0}", "'limits.cpus'"),
        ("limits = {cpus = nan}", "'limits.cpus'"),
        ("limits = {swap = 1}", "unknown key 'limits.swap'"),
    ],
)
def test_what_is_wrong_is_named(line: str, said: str) -> None:
    """Each mistake is refused in words that name it; nothing like an option or a path gets to pip."""
    text = line if line.startswith("name") else f"name = 'x'\n{line}"
    with pytest.raises(BadRequest) as caught:
        parse(text.encode(), HERE)
    assert said in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_garbage_is_a_bad_request(data: bytes) -> None:
    """Bytes that are no definition raise BadRequest and nothing else."""
    with pytest.raises(BadRequest):
        parse(data, HERE)


_KEYS = st.sampled_from("name description python packages preload environment files programs limits network".split())
_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=5))
def test_any_table_is_a_definition_or_a_bad_request(body: dict[str, object]) -> None:
    """Tables with the right keys and any values are taken with safe paths and names, or refused with BadRequest."""
    text = "\n".join(f"{key} = {_toml(value)}" for key, value in {"name": "x", **body}.items())
    try:
        found = parse(text.encode("utf-8", "surrogatepass"), HERE)
    except BadRequest:
        return
    assert check_name(found.name) == found.name
    assert all(not one.startswith(("-", ".", "/")) for one in (*found.packages, *found.preload))
    assert all(target.startswith("/") and ".." not in target.split("/") for target, _ in found.files)


def _toml(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(one) for one in value) + "]"
    return json.dumps(value)


def test_shipped_definitions_are_whole() -> None:
    """What comes with podflare parses under the name by which it is asked for."""
    assert shipped() == ("anthropic-hosted", "python-datasci")
    for name in shipped():
        assert load(name).name == name
    hosted = load("anthropic-hosted")
    assert (hosted.ram_mib, hosted.rootfs_gb, hosted.cpus, hosted.python) == (5120, 5, 1.0, "3.11")


def test_what_is_no_definition_is_told(tmp_path: Path) -> None:
    """A name that is not shipped and a file that is not there are refused with what there is."""
    with pytest.raises(BadRequest, match="python-datasci"):
        load("no-such")
    with pytest.raises(BadRequest, match=r"cannot read .*gone\.toml"):
        load(str(tmp_path / "gone.toml"))
