"""Packs what runs inside a sandbox: errors, wire and guest, found by path and never imported from here.

`python -I -S BUNDLE agent FD` must work with any Python >= 3.9 and nothing else installed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import podflare.errors

_PACKAGE = Path(podflare.errors.__file__).parent
_MAIN = '"""Entry of the bundle."""\n\nimport sys\n\nfrom podflare.guest.__main__ import main\n\nmain(sys.argv[1:])\n'


def build_bundle(target: Path) -> Path:
    """Write the bundle into the directory `target`, which is made if needed.  Returns `target`.

    Raises: OSError if it cannot be written; `target` may then hold a part of it.
    """
    package = target / "podflare"
    package.mkdir(parents=True, exist_ok=True)
    (target / "__main__.py").write_text(_MAIN)
    # Empty: the real one loads the SDK.
    (package / "__init__.py").write_text("")
    shutil.copyfile(_PACKAGE / "errors.py", package / "errors.py")
    for name in ("wire", "guest"):
        shutil.copytree(
            _PACKAGE / name, package / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"), dirs_exist_ok=True
        )
    return target
