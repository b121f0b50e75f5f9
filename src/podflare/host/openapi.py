"""The OpenAPI document, made from the dataclasses of wire.api, and its page.  Loaded on first use only.

Needs the extra `docs-page` (pydantic for the schemas, swagger-ui-bundle for the page's files): works offline.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from podflare.errors import NotBuilt
from podflare.wire.api import (
    MAX_FORKS,
    MAX_LIFETIME_S,
    CreateRequest,
    Diff,
    ExecRequest,
    ForkRequest,
    LifetimesRequest,
    SandboxInfo,
    SnapshotInfo,
    SnapshotRequest,
    TemplateInfo,
)
from podflare.wire.egress import EgressLog
from podflare.wire.merges import ON_CONFLICT, ConflictInfo, NotTransferable, Resolution

MISSING = "the API page needs more packages: pip install 'podflare[docs-page]'"
_FILES = {
    "swagger-ui.css": "text/css",
    "swagger-ui-bundle.js": "text/javascript",
    "favicon-32x32.png": "image/png",
}
_REQUESTS = (CreateRequest, ExecRequest, ForkRequest, LifetimesRequest, SnapshotRequest)
_ANSWERS = (Diff, EgressLog, SandboxInfo, SnapshotInfo, TemplateInfo, Resolution, ConflictInfo, NotTransferable)
_QUERY = {
    "paths": {"type": "array", "items": {"type": "string"}},
    "detail": {"type": "boolean"},
    "usage": {"type": "boolean"},
}
"""Schemas of query parameters that are no strings."""
_TEXTS = {"type": "array", "items": {"type": "string"}}
_CHOICE = {"anyOf": [{"type": "boolean"}, _TEXTS]}
_MERGE_BODY = {
    "type": "object",
    "properties": {
        "files": _CHOICE,
        "variables": _CHOICE,
        "on_conflict": {"enum": list(ON_CONFLICT)},
        "resolutions": {"type": "array", "items": {"$ref": "#/components/schemas/Resolution"}},
        "timeout_seconds": {"type": "number"},
    },
}
_MERGE_ANSWER = {
    "type": "object",
    "properties": {
        "merged": {"type": "object", "properties": {"files": _TEXTS, "variables": _TEXTS}},
        "conflicts": {"type": "array", "items": {"$ref": "#/components/schemas/ConflictInfo"}},
        "not_transferable": {"type": "array", "items": {"$ref": "#/components/schemas/NotTransferable"}},
        "applied": {"type": "boolean"},
    },
}
_NAMES = {"type": "array", "items": {"type": "string"}}
_TOOL_ANSWER = {
    "type": "object",
    "required": ["call_id"],
    "properties": {
        "call_id": {"type": "string"},
        "result": {"description": "any JSON"},
        "error": {"type": "object", "properties": {"type": {"type": "string"}, "message": {"type": "string"}}},
    },
}
_BOUNDS = {
    "timeout_seconds": (1, MAX_LIFETIME_S),
    "idle_timeout_seconds": (1, MAX_LIFETIME_S),
    "tool_timeout_seconds": (1, MAX_LIFETIME_S),
    "ram_mib": (64, 1024 * 1024),
    "rootfs_gb": (1, 4096),
    "n": (1, MAX_FORKS),
}
_EVENT: dict[str, Any] = {
    "type": "object",
    "required": ["type", "data", "seq", "ts"],
    "properties": {
        "type": {"enum": ["stdout", "stderr", "result", "error", "tool_call", "tool_cancelled", "warning", "exit"]},
        "data": {"description": "a line; or an object; or with exit the exit code"},
        "seq": {"type": "integer"},
        "ts": {"type": "integer"},
    },
    "additionalProperties": True,
}
_HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>podflare API</title>
<link rel="stylesheet" href="/docs/swagger-ui.css"><link rel="icon" href="/docs/favicon-32x32.png"></head>
<body><div id="page"></div><script src="/docs/swagger-ui-bundle.js"></script><script src="/docs/start.js"></script>
</body></html>
"""
_SCRIPT = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#page", deepLinking: true});\n'


@dataclass(frozen=True)
class Page:
    """One file of the page."""

    status: int
    content_type: bytes
    body: bytes


def page(name: str) -> Page:
    """The page itself (""), or a file that it loads.  With a package missing: one line saying what to install."""
    try:
        from swagger_ui_bundle import swagger_ui_path
    except ImportError:
        return Page(501, b"text/plain; charset=utf-8", MISSING.encode() + b"\n")
    if name == "":
        return Page(200, b"text/html; charset=utf-8", _HTML.encode())
    if name == "start.js":
        return Page(200, b"text/javascript", _SCRIPT.encode())
    if name not in _FILES:
        return Page(404, b"application/json", b'{"error":"no such file","code":"bad_request"}')
    return Page(200, _FILES[name].encode(), (Path(str(swagger_ui_path)) / name).read_bytes())


@functools.cache
def document() -> dict[str, Any]:
    """The OpenAPI document, 3.0: the newest that the page can show.  Raises: NotBuilt if pydantic is missing."""
    try:
        from pydantic import TypeAdapter
    except ImportError as exc:
        raise NotBuilt(MISSING) from exc
    schemas: dict[str, Any] = {
        shape.__name__: TypeAdapter(shape).json_schema(ref_template="#/components/schemas/{model}")
        for shape in (*_REQUESTS, *_ANSWERS)
    }
    # Shapes within shapes: one place for all.
    for schema in list(schemas.values()):
        schemas.update(schema.pop("$defs", {}))
    # The dataclass knows only the form that both become.
    schemas["ExecRequest"]["properties"]["tools"] = {
        "anyOf": [_NAMES, {"type": "object", "additionalProperties": _NAMES}]
    }
    _bound(schemas)
    schemas["ToolAnswer"] = _TOOL_ANSWER
    schemas["Error"] = _object(error="string", code="string")
    schemas["Sandboxes"] = _list_of("sandboxes", "SandboxInfo")
    schemas["Event"] = _EVENT
    # One round trip: what pydantic gives may hold tuples and shared objects, a document is plain JSON.
    body: dict[str, Any] = json.loads(
        json.dumps(
            {
                "openapi": "3.0.3",
                "info": {"title": "podflare host daemon", "version": "1", "description": "See docs/http-api.md."},
                "components": {
                    "schemas": schemas,
                    "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
                },
                "security": [{"key": []}, {}],
                "paths": _paths(),
            }
        )
    )
    converted: dict[str, Any] = _in_3_0(body)
    return converted


def _bound(schemas: dict[str, Any]) -> None:
    """Add what a dataclass does not say: the bounds of numbers in requests, as wire.api has them."""
    for request in _REQUESTS:
        for name, (low, high) in _BOUNDS.items():
            shape = schemas[request.__name__]["properties"].get(name, {})
            for choice in shape.get("anyOf", [shape]):
                if choice.get("type") in ("integer", "number"):
                    choice.update(minimum=low if choice["type"] == "integer" else 0.001, maximum=high)


def _in_3_0(node: Any) -> Any:
    """JSON Schema as OpenAPI 3.0 has it: no null type, no const, no tuples."""
    if isinstance(node, list):
        return [_in_3_0(item) for item in node]
    if not isinstance(node, dict):
        return node
    made = {key: _in_3_0(value) for key, value in node.items()}
    if isinstance(made.get("type"), list):
        kinds = [kind for kind in made["type"] if kind != "null"]
        made.update(type=kinds[0], nullable=len(kinds) < len(made["type"]))
    if {"type": "null"} in made.get("anyOf", ()):
        rest = [choice for choice in made.pop("anyOf") if choice != {"type": "null"}]
        made.update(rest[0] if len(rest) == 1 else {"anyOf": rest}, nullable=True)
    if "const" in made:
        made["enum"] = [made.pop("const")]
    made.pop("prefixItems", None)
    return made


def _object(**properties: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": kind} for name, kind in properties.items()}}


def _list_of(key: str, name: str) -> dict[str, Any]:
    return {"type": "object", "properties": {key: {"type": "array", "items": _ref(name)}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema}}}


def _operation(
    summary: str, *, takes: Any = None, gives: Any = None, status: int = 200, query: Any = ()
) -> dict[str, Any]:
    answers: dict[str, Any] = {str(status): {"description": "done", **(gives or {})}}
    answers["default"] = {"description": "an error", **_content("application/json", _ref("Error"))}
    operation: dict[str, Any] = {"summary": summary, "responses": answers}
    if takes is not None:
        operation["requestBody"] = takes
    if query:
        operation["parameters"] = [
            {"name": name, "in": "query", "required": required, "schema": _QUERY.get(name, {"type": "string"})}
            for name, required in query
        ]
    return operation


def _branch_paths() -> dict[str, Any]:
    children = {"type": "object", "properties": {"children": {"type": "array", "items": {"type": "string"}}}}
    return {
        "/v1/sandboxes/{id}/fork": {
            "post": _operation(
                "Fork a sandbox",
                takes=_content("application/json", _ref("ForkRequest")),
                gives=_content("application/json", children),
            )
        },
        "/v1/sandboxes/{id}/merge_into/{winner}": {
            "post": _operation("Replace a sandbox by another one", status=204),
        },
        "/v1/sandboxes/{id}/merge/{other}": {
            "post": _operation(
                "Bring in what another sandbox changed",
                takes=_content("application/json", _MERGE_BODY),
                gives=_content("application/json", _MERGE_ANSWER),
            )
        },
        "/v1/sandboxes/{id}/diff/{other}": {
            "get": _operation(
                "Files and variables that differ",
                gives=_content("application/json", _ref("Diff")),
                query=[("paths", False), ("detail", False), ("variables", False)],
            )
        },
    }


def _snapshot_paths() -> dict[str, Any]:
    info = _content("application/json", _ref("SnapshotInfo"))
    return {
        "/v1/sandboxes/{id}/snapshots": {
            "post": _operation(
                "Keep a sandbox on disk", takes=_content("application/json", _ref("SnapshotRequest")), gives=info
            )
        },
        "/v1/snapshots": {
            "get": _operation(
                "List your snapshots", gives=_content("application/json", _list_of("snapshots", "SnapshotInfo"))
            )
        },
        "/v1/snapshots/{name}": {
            "get": _operation("One snapshot", gives=info),
            "delete": _operation("Remove a snapshot", status=204),
        },
    }


def _cell_paths(raw: dict[str, Any]) -> dict[str, Any]:
    events = _content("application/x-ndjson", _ref("Event"))
    interrupted = {
        "type": "object",
        "properties": {"interrupted": {"type": "boolean"}, "cell_id": {"type": ["string", "null"]}},
    }
    return {
        "/v1/sandboxes/{id}/exec": {
            "post": _operation("Run a cell", takes=_content("application/json", _ref("ExecRequest")), gives=events)
        },
        "/v1/sandboxes/{id}/interrupt": {
            "post": _operation(
                "Interrupt a cell",
                takes=_content("application/json", _object(cell_id="string")),
                gives=_content("application/json", interrupted),
            )
        },
        "/v1/sandboxes/{id}/replay": {"get": _operation("Latest events", gives=events)},
        "/v1/sandboxes/{id}/cells/{cell}/output": {
            "get": _operation("Whole output of a cell", gives=raw, query=[("stream", False)])
        },
        "/v1/sandboxes/{id}/cells/{cell}/tool_results": {
            "post": _operation("Answer a tool call", takes=_content("application/json", _ref("ToolAnswer")), status=204)
        },
    }


def _paths() -> dict[str, Any]:
    info = _content("application/json", _ref("SandboxInfo"))
    raw = _content("application/octet-stream", {"type": "string", "format": "binary"})
    paths: dict[str, Any] = {
        "/v1/healthz": {"get": _operation("Alive?", gives=_content("text/plain", {"const": "ok"}))},
        "/v1/capacity": {"get": _operation("Pool and limits", gives=_content("application/json", {"type": "object"}))},
        "/v1/templates": {
            "get": _operation(
                "What sandboxes can start from",
                gives=_content("application/json", _list_of("templates", "TemplateInfo")),
            )
        },
        "/v1/sandboxes": {
            "post": _operation(
                "Create a sandbox", takes=_content("application/json", _ref("CreateRequest")), gives=info
            ),
            "get": _operation(
                "List your sandboxes", gives=_content("application/json", _ref("Sandboxes")), query=[("usage", False)]
            ),
        },
        "/v1/sandboxes/{id}": {
            "get": _operation("One sandbox", gives=info, query=[("usage", False)]),
            "patch": _operation(
                "Change its lifetimes", takes=_content("application/json", _ref("LifetimesRequest")), gives=info
            ),
            "delete": _operation("End a sandbox", status=204),
        },
        **_cell_paths(raw),
        **_branch_paths(),
        **_snapshot_paths(),
        "/v1/sandboxes/{id}/egress": {
            "get": _operation("What it tried to reach", gives=_content("application/json", _ref("EgressLog")))
        },
        "/v1/sandboxes/{id}/files": {
            "put": _operation(
                "Write a file", takes=raw, gives=_content("application/json", {}), query=[("path", True)]
            ),
            "get": _operation("Read a file", gives=raw, query=[("path", True)]),
        },
    }
    for path, operations in paths.items():
        names = [part[1:-1] for part in path.split("/") if part.startswith("{")]
        if names:
            operations["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
            ]
    return paths
