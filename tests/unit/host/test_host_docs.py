"""The API's document and its machine-readable form know every route."""

from __future__ import annotations

from pathlib import Path

from podflare.errors import BY_CODE
from podflare.host.app import NOT_BUILT, App
from podflare.host.config import Config
from podflare.host.openapi import document

PAGE = Path(__file__).parents[3] / "docs" / "http-api.md"


def routes() -> dict[str, set[str]]:
    app = App(None, Config())  # type: ignore[arg-type]  # routes need no daemon
    return {route.path: set(route.methods or ()) - {"HEAD"} for route in app._router.routes}


def test_every_route_is_in_the_document():
    """docs/http-api.md has a heading for each built route and method."""
    text = PAGE.read_text()
    unbuilt = {path for paths in NOT_BUILT.values() for _, path in paths}
    for path, methods in routes().items():
        if path.startswith("/v1") and path not in unbuilt:
            for method in methods:
                assert f"### `{method} {path}" in text, (method, path)


def test_every_built_route_is_in_openapi_and_no_other():
    """The OpenAPI document lists exactly the built routes with their methods."""
    unbuilt = {path for paths in NOT_BUILT.values() for _, path in paths}
    built = {path: methods for path, methods in routes().items() if path.startswith("/v1") and path not in unbuilt}
    described = {
        path: {name.upper() for name in operations if name != "parameters"}
        for path, operations in document()["paths"].items()
    }
    assert described == built


def test_codes_in_the_document_exist():
    """Each stable code that the document names is one of errors.py."""
    table = PAGE.read_text().partition("| status | code |")[2].partition("\n\n")[0]
    named = {word for line in table.splitlines()[2:] for word in line.split("|")[2].split("`")[1::2]}
    assert named and named <= BY_CODE.keys()
