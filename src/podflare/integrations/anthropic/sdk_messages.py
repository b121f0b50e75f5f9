"""Requests and responses of the `anthropic` package as its middleware sees them.

The package is imported on use: whoever has a request of it, has it.  What of it is not public is named here only.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

from podflare.integrations.anthropic.hosted.definitions import forward_betas

_RAW = "x-stainless-raw-response"
_STALE = ("content-encoding", "content-length", "transfer-encoding", "content-type")


def path_of(request: Any) -> str:
    """Path of a request, without its query."""
    return urlsplit(str(request.url)).path.rstrip("/")


def body_of(request: Any) -> dict[str, Any]:
    """The JSON body, with what the caller added as `extra_body`."""
    given = request.json
    extra = getattr(request.options, "extra_json", None)
    return {**(given if isinstance(given, Mapping) else {}), **(extra if isinstance(extra, Mapping) else {})}


def with_body(request: Any, body: Mapping[str, Any]) -> Any:
    """The request with another body, and without betas that mean nothing to the API then."""
    copy = request.copy(body=dict(body), headers=_forwarded(request.headers))
    copy.options.extra_json = None
    return copy


def _forwarded(headers: Mapping[str, Any]) -> dict[str, Any]:
    kept = dict(headers)
    for name, value in headers.items():
        if name.lower() == "anthropic-beta" and isinstance(value, str):
            betas = forward_betas(value)
            if betas is None:
                del kept[name]
            else:
                kept[name] = betas
    return kept


def http_library() -> ModuleType:
    """httpx2, or httpx for old versions of the package: its classes are those that the package takes."""
    from anthropic import _base_client

    library: ModuleType = getattr(_base_client, "httpx2", None) or getattr(_base_client, "httpx")  # noqa: B009  # of old versions only
    return library


def json_response(
    request: Any,
    status: int,
    value: Mapping[str, Any] | bytes,
    *,
    asynchronous: bool,
    client: Any = None,
    like: Any = None,
) -> Any:
    """A response of the package with this JSON body, encoded or not.

    Args:
        client: needed unless the status is an error.
        like: a response whose headers to take.
    """
    http = http_library()
    headers = [] if like is None else [(k, v) for k, v in like.http_response.headers.multi_items() if k not in _STALE]
    raw = http.Response(
        status,
        headers=[*headers, ("content-type", "application/json")],
        content=value if isinstance(value, bytes) else json.dumps(value).encode(),
        request=_http_request(request, like),
    )
    return _wrapped(request, raw, asynchronous=asynchronous, stream=False, client=client)


def _http_request(request: Any, like: Any) -> Any:
    if like is not None:
        return like.http_response.request
    return http_library().Request(request.method.upper(), "http://localhost" + path_of(request))


def _wrapped(request: Any, raw: Any, *, asynchronous: bool, stream: bool, client: Any) -> Any:
    from anthropic._response import APIResponse, AsyncAPIResponse

    return (AsyncAPIResponse if asynchronous else APIResponse)(
        raw=raw,
        cast_to=request.cast_to,
        client=client,
        stream=stream,
        stream_cls=request.stream_cls,
        options=request.options,
        retries_taken=request.retries_taken,
    )


def stream_response(
    request: Any,
    frames: Generator[bytes, None, None] | AsyncGenerator[bytes, None],
    *,
    asynchronous: bool,
    client: Any,
    like: Any = None,
) -> Any:
    """A response of the package whose body is an event stream."""
    http = http_library()
    headers = [] if like is None else [(k, v) for k, v in like.http_response.headers.multi_items() if k not in _STALE]
    raw = http.Response(
        200,
        headers=[*headers, ("content-type", "text/event-stream; charset=utf-8")],
        stream=_asynchronous_body(http, frames) if asynchronous else _body(http, frames),
        request=_http_request(request, like),
    )
    return _wrapped(request, raw, asynchronous=asynchronous, stream=True, client=client)


def _body(http: ModuleType, frames: Any) -> Any:
    class Body(http.SyncByteStream):  # type: ignore[name-defined,misc]  # the library is chosen at run time
        def __iter__(self) -> Iterator[bytes]:
            return iter(frames)

        def close(self) -> None:
            frames.close()

    return Body()


def _asynchronous_body(http: ModuleType, frames: Any) -> Any:
    class Body(http.AsyncByteStream):  # type: ignore[name-defined,misc]  # as above
        def __aiter__(self) -> Any:
            return frames.__aiter__()

        async def aclose(self) -> None:
            await frames.aclose()

    return Body()


def connection_error() -> type[Exception]:
    """What is raised where the API could not be reached."""
    import anthropic

    return anthropic.APIConnectionError


def broken_connection() -> type[Exception]:
    """What is raised where a body breaks off."""
    error: type[Exception] = http_library().HTTPError
    return error


def client_of(response: Any) -> Any:
    """The client that a response belongs to."""
    return response._client


def wants_wrapper(request: Any) -> bool:
    """Whether the caller asked for the raw response, not for what it says."""
    return any(name.lower() == _RAW for name in request.headers)


def parsed(request: Any, value: Mapping[str, Any]) -> Any:
    """The value as the model that the caller expects."""
    return request.cast_to.model_validate(value)


def file_response(request: Any, content: bytes, *, asynchronous: bool) -> Any:
    """A download."""
    raw = http_library().Response(
        200,
        headers={"content-type": "application/octet-stream"},
        content=content,
        request=_http_request(request, None),
    )
    return request.cast_to(
        raw=raw,
        cast_to=bytes,
        client=None,
        stream=False,
        stream_cls=None,
        options=request.options,
        retries_taken=request.retries_taken,
    )
