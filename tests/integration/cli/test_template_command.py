"""`podflare template` and what a daemon, the SDK and HTTP do with what it builds."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from daemons import served
from podflare import Sandbox, close_default_client
from podflare.errors import UnknownTemplate
from programs import PROGRAM, Cli
from wheels import make_wheel

DEFINITION = """
name = "small"
description = "for tests"
packages = ["greeting"]
preload = ["greeting"]
[programs]
"no-such-program" = "nosuch"
"no-such-bash|bash" = "bash"
[limits]
ram_mib = 333
rootfs_gb = 2
"""


@dataclass
class Place:
    """A folder with a definition, a wheel and a template directory; the command; a daemon."""

    folder: Path
    cli: Cli
    built: str
    """What the first build said."""

    def build(self, text: str, *words: str) -> tuple[int, str]:
        """Build a definition from the folder's wheels alone: exit code, and all that was said."""
        path = self.folder / "other.toml"
        path.write_text(text)
        done = self.cli("template", "build", str(path), "--find-links", str(self.folder), "--no-index", *words)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(private_temp: Path) -> Iterator[Place]:
    """A daemon that was running when the template was built, and has its zygote now."""
    with tempfile.TemporaryDirectory(prefix="tc", dir=private_temp) as name:
        folder = Path(name)
        folder.chmod(0o711)
        make_wheel(folder, "greeting", "1.0", {"greeting.py": "import sys\nTEXT = 'hello'\n"})
        (folder / "small.toml").write_text(DEFINITION)
        environment = {"PODFLARE_TEMPLATE_DIR": str(folder / "templates"), "PODFLARE_POOL_TEMPLATES": "small=0,gone=1"}
        with served(folder, env=environment) as daemon:
            cli = Cli(daemon.url)
            cli.environment.update(environment)
            with pytest.raises(UnknownTemplate, match="podflare template build"):
                Sandbox(host=daemon.url, template="small")
            words = ("template", "build", str(folder / "small.toml"), "--find-links", str(folder), "--no-index")
            done = cli(*words)
            assert done.returncode == 0, done.stdout + done.stderr
            Sandbox(host=daemon.url, template="small").close()
            close_default_client()
            yield Place(folder, cli, done.stdout + done.stderr)


def test_a_build_tells_each_step_and_what_is_missing(place: Place) -> None:
    """Without a terminal each step is a line; programs that are not here are named with their package."""
    assert "template small: installing 1 package(s) for Python 3." in place.built
    assert "template small: starting a sandbox of it" in place.built
    assert "warning: no-such-program is not on this computer (nosuch has it)" in place.built
    assert "no-such-bash" not in place.built
    assert "small is built: 1 package(s)" in place.built


def test_the_running_daemon_makes_sandboxes_of_it(place: Place) -> None:
    """SDK, command line and HTTP start from it, with its limits unless the creator names others."""
    with Sandbox(host=place.cli.address, template="small") as sandbox:
        assert sandbox.run_code("import sys; print('greeting' in sys.modules)").stdout.strip() == "True"
        assert sandbox.run_code("no-such-bash -c 'echo linked'", "bash").stdout.strip() == "linked"
        info = sandbox.info()
        assert (info.template, info.ram_mib, info.rootfs_gb) == ("small", 333, 2)
        (child,) = sandbox.fork()
        with child:
            assert child.run_code("import greeting; print(greeting.TEXT)").stdout.strip() == "hello"
            assert child.info().template == "small"
    with Sandbox(host=place.cli.address, template="small", rootfs_gb=1) as sandbox:
        assert (sandbox.info().ram_mib, sandbox.info().rootfs_gb) == (333, 1)
    done = place.cli("run", "--template", "small", "-c", "import greeting; print(greeting.TEXT)")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done.stderr


def test_templates_are_listed_over_http(place: Place) -> None:
    """GET /v1/templates has default and what was built, without a path of the computer; capacity names the pools."""
    with httpx.Client(base_url=place.cli.address) as client:
        answer = client.get("/v1/templates")
        found = {entry["name"]: entry for entry in answer.json()["templates"]}
        capacity = client.get("/v1/capacity").json()
    assert next(iter(found)) == "default" and found["default"]["ram_mib"] == 1024
    small = found["small"]
    assert (small["packages"], small["preload"], small["problem"]) == ({"greeting": "1.0"}, ["greeting"], "")
    assert (small["ram_mib"], small["cpus"], small["missing_programs"]) == (333, None, ["no-such-program"])
    assert str(place.folder) not in answer.text
    assert "small" in capacity["templates"] and [pool["template"] for pool in capacity["pools"]] == ["default"]


def test_ls_and_show_tell_what_is_there(place: Place) -> None:
    """`ls` has built and shipped ones with their state, `show` the versions; both as JSON, too."""
    lines = place.cli("template", "ls").stdout.splitlines()
    assert any(line.startswith("small ") and " built " in line and "for tests" in line for line in lines)
    assert any(line.startswith("anthropic-hosted ") and "not built" in line for line in lines)
    rows = {row["name"]: row for row in json.loads(place.cli("template", "ls", "--json").stdout)}
    assert rows["small"]["problem"] == "" and rows["python-datasci"]["problem"] == "not built"
    shown = place.cli("template", "show", "small").stdout
    assert "greeting==1.0" in shown and "333 MiB" in shown
    body = json.loads(place.cli("template", "show", "small", "--json").stdout)
    assert body["packages"] == {"greeting": "1.0"} and Path(body["directory"]).is_dir()


def test_nothing_is_built_twice(place: Place) -> None:
    """An unchanged definition is done at once and keeps its tree."""
    before = place.cli("template", "show", "small", "--json").stdout
    path = str(place.folder / "small.toml")
    done = place.cli("template", "build", path, "--find-links", str(place.folder), "--no-index")
    assert done.returncode == 0 and "built already" in done.stdout and "installing" not in done.stderr
    assert place.cli("template", "show", "small", "--json").stdout == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name = 'x'\npackages = ['nosuch-package']", "there is no nosuch-package with a wheel for Python 3."),
        ("name = 'x'\nfiles = {'/a' = 'nothing-here'}", "is neither a file nor a directory"),
        ("name = 'x'\npreload = ['nowhere.to']", "'x' cannot start: nowhere.to cannot be imported"),
        ("name", "not TOML"),
    ],
)
def test_a_failed_build_says_why_and_leaves_nothing(place: Place, text: str, said: str) -> None:
    """One line on stderr names what is wrong, the exit code is 1, and there is no such template."""
    code, output = place.build(text)
    assert code == 1 and said in output, output
    assert "Traceback" not in output
    templates = place.folder / "templates"
    assert not (templates / "x.json").exists() and list(templates.glob("building-*")) == []


def test_source_packages_are_refused(place: Place, tmp_path: Path) -> None:
    """A package without a wheel is not built: its setup.py, which would run as this user, does not run."""
    source = tmp_path / "evil-1.0"
    source.mkdir()
    mark = tmp_path / "ran"
    (source / "setup.py").write_text(f"open({str(mark)!r}, 'w')\nfrom setuptools import setup\nsetup(name='evil')\n")
    (source / "PKG-INFO").write_text("Metadata-Version: 1.0\nName: evil\nVersion: 1.0\n")
    with tarfile.open(place.folder / "evil-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, arcname="evil-1.0")
    code, output = place.build("name = 'x'\npackages = ['evil']")
    assert code == 1 and "--from-source" in output, output
    assert not mark.exists()


def test_rm_forgets_a_template(place: Place) -> None:
    """What was removed is not listed and not started; removing it again says what there is."""
    code, output = place.build("name = 'brief'")
    assert code == 0, output
    assert place.cli("template", "rm", "brief").stdout == "brief is removed\n"
    again = place.cli("template", "rm", "brief")
    assert again.returncode == 1 and "built: small" in again.stderr
    done = place.cli("run", "--template", "brief", "-c", "1")
    assert done.returncode == 1 and "unknown template" in done.stderr


@pytest.mark.soak
def test_anthropic_hosted_is_built_and_imports_every_library(cli: Cli) -> None:
    """The hosted look-alike builds from the package index, and every library of the hosted list imports."""
    modules = (
        "pandas numpy scipy sklearn statsmodels.api matplotlib.pyplot seaborn pyarrow openpyxl xlsxwriter xlrd PIL "
        "pptx docx pypdf pdfplumber pypdfium2 pdf2image pdfkit tabula reportlab.platypus img2pdf sympy mpmath tqdm "
        "dateutil pytz joblib"
    ).split()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**cli.environment, "PODFLARE_TEMPLATE_DIR": f"{folder}/templates"}
        environment.pop("PODFLARE_HOSTD_URL")

        def run(*words: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*PROGRAM, *words], env=environment, capture_output=True, text=True, timeout=1800)

        built = run("template", "build", "anthropic-hosted")
        assert built.returncode == 0, built.stderr
        code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\nprint('all', {len(modules)})"
        done = run("run", "--template", "anthropic-hosted", "-c", code)
        assert (done.returncode, done.stdout) == (0, f"all {len(modules)}\n"), done.stderr
        assert os.listdir(f"{folder}/templates/trees")
