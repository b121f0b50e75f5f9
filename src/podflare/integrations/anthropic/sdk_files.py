"""The Files API inside the client: what is kept here is answered here, everything else is the API's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from podflare.errors import BadRequest
from podflare.integrations.anthropic import sdk_messages as sdk
from podflare.integrations.anthropic.containers.descriptions import described
from podflare.integrations.anthropic.containers.files import FileStore
from podflare.integrations.anthropic.containers.index import FileRow

_FILES = "/v1/files"
_PIECE_BYTES = 1024 * 1024


def concerns(request: Any, *, uploads: bool) -> bool:
    """Whether the request could be about a file that is kept here."""
    path, method = sdk.path_of(request), str(request.method).lower()
    if path == _FILES:
        return uploads and method == "post"
    return path.startswith(_FILES + "/") and method in ("get", "delete")


def answer(request: Any, store: FileStore, owner: str, *, asynchronous: bool, client: Any) -> Any:
    """The answer, for what `concerns` says; None if the file is not kept here.  Blocking.

    Raises: PodflareError for what the API refuses, too.
    """
    path, method = sdk.path_of(request), str(request.method).lower()
    if path == _FILES:
        return _told(request, described(_upload(request, store, owner)), asynchronous, client)
    file_id, _, rest = path.removeprefix(_FILES + "/").partition("/")
    if not store.knows(owner, file_id):
        return None
    row = store.find(owner, file_id)
    if method == "delete":
        store.delete(owner, file_id)
        return _told(request, {"id": file_id, "type": "file_deleted"}, asynchronous, client)
    if rest == "content":
        if not row.downloadable:
            raise BadRequest("File is not downloadable: only files that code execution made can be downloaded")
        return sdk.file_response(request, store.path_of(row).read_bytes(), asynchronous=asynchronous)
    return _told(request, described(row), asynchronous, client)


def _told(request: Any, value: Mapping[str, Any], asynchronous: bool, client: Any) -> Any:
    if sdk.wants_wrapper(request):
        return sdk.json_response(request, 200, value, asynchronous=asynchronous, client=client)
    return sdk.parsed(request, value)


def _upload(request: Any, store: FileStore, owner: str) -> FileRow:
    files = request.options.files
    pairs = list(files.items()) if isinstance(files, Mapping) else list(files or [])
    if len(pairs) != 1:
        raise BadRequest("file: exactly one is needed")
    given = pairs[0][1]
    name, content, kind = (*given, None, None)[:3] if isinstance(given, tuple) else (None, given, None)
    if name is None:
        name = getattr(content, "name", None)
    path = store.new_path()
    try:
        with path.open("wb") as target:
            for piece in _pieces(content):
                target.write(piece)
        name = Path(str(name)).name if name else "unnamed"
        lifetime = sdk.body_of(request).get("expires_in_seconds")
        return store.keep(owner, path, name, mime_type=kind, downloadable=False, lifetime_s=lifetime)
    finally:
        path.unlink(missing_ok=True)


def _pieces(content: Any) -> Any:
    if isinstance(content, str):
        content = content.encode()
    if isinstance(content, (bytes, bytearray)):
        yield bytes(content)
        return
    if not hasattr(content, "read"):
        raise BadRequest(f"file: {type(content).__name__} cannot be uploaded")
    while piece := content.read(_PIECE_BYTES):
        yield piece.encode() if isinstance(piece, str) else piece
