"""Kept files as the Files API describes them."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from podflare.integrations.anthropic.containers.index import FileRow


def described(row: FileRow) -> dict[str, Any]:
    """The metadata object of a file."""
    return {
        "id": row.id,
        "type": "file",
        "filename": row.filename,
        "mime_type": row.mime_type,
        "size_bytes": row.size_bytes,
        "created_at": moment(row.created_at),
        "downloadable": row.downloadable,
        "expires_at": None if row.expires_at is None else moment(row.expires_at),
    }


def moment(at_unix_s: float) -> str:
    """RFC 3339, in UTC."""
    return datetime.fromtimestamp(at_unix_s, timezone.utc).isoformat().replace("+00:00", "Z")
