"""Open sqlite connections of a forked REPL.

SQLite remembers the inode of a database file and refuses to write once the path has another one, which it has in
a child: its files are copies.  So each connection is opened anew in place: the object stays, its cursors start over.
"""

from __future__ import annotations

import gc
import sys
from typing import Any, List


def reconnect() -> List[str]:
    """Open every connection to a database file anew.  Returns notes on what was lost by that."""
    sqlite3 = sys.modules.get("sqlite3")
    if sqlite3 is None:
        return []
    notes: List[str] = []
    try:
        kind = sqlite3.Connection
        found = [thing for thing in gc.get_objects() if isinstance(thing, kind)]
    except Exception:  # noqa: BLE001  # user code has replaced the module
        return []
    for connection in found:
        try:
            notes += _reopen(connection)
        except Exception as exc:  # noqa: BLE001  # closed, or a class of the user's with other needs
            if "closed database" not in str(exc):
                notes.append(f"an sqlite connection could not be opened anew: {exc}"[:300])
    return notes


def _reopen(connection: Any) -> List[str]:
    files = {name: path for _, name, path in connection.execute("PRAGMA database_list")}
    if not files.get("main"):
        return []  # in memory: it was forked with the memory
    lost = [f"sqlite: the open transaction on {files['main']} is rolled back here"] if connection.in_transaction else []
    attached = [(name, path) for name, path in files.items() if name not in ("main", "temp") and path]
    kept = {name: getattr(connection, name) for name in ("row_factory", "text_factory", "isolation_level")}
    connection.__init__(files["main"], isolation_level=kept["isolation_level"])
    connection.row_factory, connection.text_factory = kept["row_factory"], kept["text_factory"]
    for name, path in attached:
        connection.execute(f"ATTACH ? AS {name}", (path,))
    return lost
