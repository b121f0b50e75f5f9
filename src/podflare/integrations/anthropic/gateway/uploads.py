"""`/v1/files`: the gateway's own file store, as the Files API shows it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import parse_qsl

import anyio.to_thread

from podflare.errors import BadRequest, TooLarge
from podflare.integrations.anthropic.containers.descriptions import described
from podflare.integrations.anthropic.containers.files import FileStore
from podflare.integrations.anthropic.gateway.exchange import ClientGone, Exchange

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MAX_PAGE = 1000
_DEFAULT_PAGE = 20
_LIFETIME_S = (3600, 90 * 24 * 3600)
_PIECE_BYTES = 256 * 1024
_FORM_OVERHEAD_BYTES = 64 * 1024
_PAGE_PREFIX = "page_"


async def upload(exchange: Exchange, store: FileStore) -> None:
    """POST /v1/files."""
    path = store.new_path()
    try:
        form = await _receive(exchange, path, store.max_file_bytes)
        if form.filename is None:
            raise BadRequest("file: Field required")
        row = await anyio.to_thread.run_sync(
            lambda: store.keep(
                exchange.owner,
                path,
                form.name,
                mime_type=form.mime_type,
                downloadable=False,
                lifetime_s=form.lifetime_s,
            )
        )
    finally:
        path.unlink(missing_ok=True)
    await exchange.json(200, described(row))


async def page(exchange: Exchange, store: FileStore) -> None:
    """GET /v1/files, with the cursors of all versions of the API."""
    fields = parse_qsl(exchange.scope["query_string"].decode("latin-1"), max_num_fields=256)
    ids = [value for name, value in fields if name in ("ids", "ids[]")]
    if ids:
        found = [store.find(exchange.owner, each) for each in dict.fromkeys(ids) if store.knows(exchange.owner, each)]
        rows, more = found[:100], False
    else:
        query = dict(fields)
        after = query.get("page", "").removeprefix(_PAGE_PREFIX) or query.get("after_id")
        rows, more = store.page(exchange.owner, limit=_limit(query), after=after, before=query.get("before_id"))
    await exchange.json(
        200,
        {
            "data": [described(row) for row in rows],
            "has_more": more,
            "first_id": rows[0].id if rows else None,
            "last_id": rows[-1].id if rows else None,
            "next_page": _PAGE_PREFIX + rows[-1].id if more else None,
        },
    )


def _limit(query: dict[str, str]) -> int:
    text = query.get("limit", str(_DEFAULT_PAGE))
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= MAX_PAGE:
        raise BadRequest(f"limit: must be between 1 and {MAX_PAGE}")
    return int(text)


async def metadata(exchange: Exchange, store: FileStore) -> None:
    """GET /v1/files/{id}."""
    await exchange.json(200, described(store.find(exchange.owner, exchange.scope["path_params"]["file_id"])))


async def delete(exchange: Exchange, store: FileStore) -> None:
    """DELETE /v1/files/{id}."""
    file_id = exchange.scope["path_params"]["file_id"]
    store.delete(exchange.owner, file_id)
    await exchange.json(200, {"id": file_id, "type": "file_deleted"})


async def content(exchange: Exchange, store: FileStore) -> None:
    """GET /v1/files/{id}/content: of files that code made."""
    row = store.find(exchange.owner, exchange.scope["path_params"]["file_id"])
    if not row.downloadable:
        raise BadRequest("File is not downloadable: only files that code execution made can be downloaded")
    async with await anyio.open_file(store.path_of(row), "rb") as stream:
        # Never shown in a browser as what it claims to be: the content is a sandbox's.
        headers = {
            "content-type": "application/octet-stream",
            "content-length": str(row.size_bytes),
            "content-disposition": "attachment",
            "x-content-type-options": "nosniff",
        }
        await exchange.start(200, headers)
        left = row.size_bytes
        while left > 0 and (data := await stream.read(min(_PIECE_BYTES, left))):
            left -= len(data)
            await exchange.piece(data)
    await exchange.piece(b"", more=False)


class _Form:
    """Callbacks of the multipart parser: writes the one file to disk as it comes."""

    def __init__(self, target: IO[bytes], cap_bytes: int) -> None:
        self.filename: str | None = None
        self.mime_type: str | None = None
        self._target = target
        self._cap_bytes = cap_bytes
        self._size = 0
        self._header = [b"", b""]
        self._headers: dict[str, str] = {}
        self._field = ""
        self._lifetime = b""
        self._pending: list[bytes] = []

    @property
    def name(self) -> str:
        """The last component of the given file name."""
        return (self.filename or "").replace("\\", "/").rpartition("/")[2][:255] or "unnamed"

    @property
    def lifetime_s(self) -> float | None:
        """Raises: BadRequest outside of what the API takes."""
        if not self._lifetime:
            return None
        low, high = _LIFETIME_S
        if not self._lifetime.isdigit() or len(self._lifetime) > 9 or not low <= int(self._lifetime) <= high:
            raise BadRequest(f"expires_in_seconds: must be between {low} and {high}")
        return float(self._lifetime)

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._part_begin,
            "on_header_field": lambda data, start, end: self._more(0, data[start:end]),
            "on_header_value": lambda data, start, end: self._more(1, data[start:end]),
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_end,
            "on_part_data": lambda data, start, end: self._data(data[start:end]),
        }

    def _part_begin(self) -> None:
        self._headers, self._field, self._header = {}, "", [b"", b""]

    def _more(self, which: int, data: bytes) -> None:
        self._header[which] += data
        if len(self._header[which]) > 8192:
            raise BadRequest("multipart: a header is too long")

    def _header_end(self) -> None:
        name, value = self._header
        self._headers[name.decode("latin-1").lower()] = value.decode("utf-8", "replace")
        self._header = [b"", b""]

    def _headers_end(self) -> None:
        from python_multipart.multipart import parse_options_header

        _, options = parse_options_header(self._headers.get("content-disposition", ""))
        self._field = options.get(b"name", b"").decode("utf-8", "replace")
        if self._field == "file":
            if self.filename is not None:
                raise BadRequest("file: there is more than one")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")
            self.mime_type = self._headers.get("content-type", "").partition(";")[0].strip() or None

    def _data(self, data: bytes) -> None:
        if self._field == "file":
            self._size += len(data)
            if self._size > self._cap_bytes:
                raise TooLarge(f"File exceeds the maximum size of {self._cap_bytes} bytes")
            self._pending.append(data)
        elif self._field == "expires_in_seconds":
            self._lifetime = (self._lifetime + data)[:64]

    def flush(self) -> None:
        """Write what has come.  Blocking."""
        for data in self._pending:
            self._target.write(data)
        self._pending.clear()


async def _receive(exchange: Exchange, path: Path, cap_bytes: int) -> _Form:
    """Read a multipart body in constant memory.

    Raises: BadRequest, TooLarge, ClientGone.
    """
    from python_multipart.exceptions import MultipartParseError
    from python_multipart.multipart import MultipartParser, parse_options_header

    kind, options = parse_options_header(exchange.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise BadRequest("the body must be multipart/form-data")
    size = 0
    with path.open("wb") as target:
        form = _Form(target, cap_bytes)
        parser = MultipartParser(options[b"boundary"], form.callbacks())
        try:
            async for data in _steady(exchange):
                size += len(data)
                if size > cap_bytes + _FORM_OVERHEAD_BYTES:
                    raise TooLarge(f"File exceeds the maximum size of {cap_bytes} bytes")
                parser.write(data)
                await anyio.to_thread.run_sync(form.flush)
            parser.finalize()
        except MultipartParseError as exc:
            raise BadRequest("the multipart body is broken") from exc
    return form


async def _steady(exchange: Exchange) -> AsyncIterator[bytes]:
    """The body, from a client that keeps sending."""
    parts = exchange.parts()
    while True:
        try:
            with anyio.fail_after(exchange.config.stall_s):
                data = await anext(parts, None)
        except TimeoutError:
            raise ClientGone from None
        if data is None:
            return
        yield data
