"""Self-hosted sandboxes for AI agents.

    from podflare import Sandbox

    with Sandbox() as sandbox:
        print(sandbox.run_code("print(6 * 7)").stdout)

Every public name is loaded on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from podflare.client import close_default_client as close_default_client
    from podflare.client._async.client import AsyncClient as AsyncClient
    from podflare.client._async.explore import explore_async as explore_async
    from podflare.client._async.pty import AsyncPtyHandle as AsyncPtyHandle
    from podflare.client._async.pty import AsyncPtyNamespace as AsyncPtyNamespace
    from podflare.client._async.sandbox import AsyncSandbox as AsyncSandbox
    from podflare.client._egress import Secret as Secret
    from podflare.client._ranking import Attempt as Attempt
    from podflare.client._ranking import Exploration as Exploration
    from podflare.client._regions import RegionInfo as RegionInfo
    from podflare.client._regions import detect_local_region as detect_local_region
    from podflare.client._regions import haversine_km as haversine_km
    from podflare.client._regions import nearest_region_to as nearest_region_to
    from podflare.client._regions import resolve_region as resolve_region
    from podflare.client._sync.client import Client as Client
    from podflare.client._sync.explore import explore as explore
    from podflare.client._sync.pty import PtyHandle as PtyHandle
    from podflare.client._sync.pty import PtyNamespace as PtyNamespace
    from podflare.client._sync.sandbox import Sandbox as Sandbox
    from podflare.client._types import CellError as CellError
    from podflare.client._types import Diff as Diff
    from podflare.client._types import ExecResult as ExecResult
    from podflare.client._types import Language as Language
    from podflare.client._types import PathChange as PathChange
    from podflare.client._types import PtySessionInfo as PtySessionInfo
    from podflare.client._types import Result as Result
    from podflare.client._types import ToolCallEvent as ToolCallEvent
    from podflare.client._types import VariableChange as VariableChange
    from podflare.client._types import VariablesDiff as VariablesDiff
    from podflare.client._types import VariableState as VariableState
    from podflare.errors import BadRequest as BadRequest
    from podflare.errors import CallNotFound as CallNotFound
    from podflare.errors import CellNotFound as CellNotFound
    from podflare.errors import Conflict as Conflict
    from podflare.errors import ConnectionLost as ConnectionLost
    from podflare.errors import DaemonStartFailed as DaemonStartFailed
    from podflare.errors import DaemonUnreachable as DaemonUnreachable
    from podflare.errors import DeadlineExceeded as DeadlineExceeded
    from podflare.errors import EgressUnavailable as EgressUnavailable
    from podflare.errors import FileAccessError as FileAccessError
    from podflare.errors import FileMissing as FileMissing
    from podflare.errors import Forbidden as Forbidden
    from podflare.errors import IsolationIncomplete as IsolationIncomplete
    from podflare.errors import MachineFailed as MachineFailed
    from podflare.errors import MergeConflict as MergeConflict
    from podflare.errors import NoCapacity as NoCapacity
    from podflare.errors import NotBuilt as NotBuilt
    from podflare.errors import PodflareError as PodflareError
    from podflare.errors import PodflareWarning as PodflareWarning
    from podflare.errors import ProtocolError as ProtocolError
    from podflare.errors import QuotaExceeded as QuotaExceeded
    from podflare.errors import SandboxEndingWarning as SandboxEndingWarning
    from podflare.errors import SandboxNotFound as SandboxNotFound
    from podflare.errors import SnapshotNotFound as SnapshotNotFound
    from podflare.errors import TemplateFailed as TemplateFailed
    from podflare.errors import TooLarge as TooLarge
    from podflare.errors import Unauthorized as Unauthorized
    from podflare.errors import UnknownRegionError as UnknownRegionError
    from podflare.errors import UnknownTemplate as UnknownTemplate
    from podflare.wire.api import ForkReport as ForkReport
    from podflare.wire.api import SandboxInfo as SandboxInfo
    from podflare.wire.api import SandboxUsage as SandboxUsage
    from podflare.wire.api import SnapshotInfo as SnapshotInfo
    from podflare.wire.egress import EgressEntry as EgressEntry
    from podflare.wire.egress import EgressLog as EgressLog
    from podflare.wire.events import Event as Event
    from podflare.wire.merges import ConflictInfo as ConflictInfo
    from podflare.wire.merges import MergeReport as MergeReport
    from podflare.wire.merges import MergeSide as MergeSide
    from podflare.wire.merges import NotTransferable as NotTransferable

    REGIONS: dict[str, str]

__version__ = "0.1.0"

_HOMES = {
    "client": ("close_default_client",),
    "client._async.client": ("AsyncClient",),
    "client._async.explore": ("explore_async",),
    "client._async.pty": ("AsyncPtyHandle", "AsyncPtyNamespace"),
    "client._async.sandbox": ("AsyncSandbox",),
    "client._egress": ("Secret",),
    "client._ranking": ("Attempt", "Exploration"),
    "client._regions": ("RegionInfo", "detect_local_region", "haversine_km", "nearest_region_to", "resolve_region"),
    "client._sync.client": ("Client",),
    "client._sync.explore": ("explore",),
    "client._sync.pty": ("PtyHandle", "PtyNamespace"),
    "client._sync.sandbox": ("Sandbox",),
    "client._types": (
        "CellError",
        "Diff",
        "ExecResult",
        "Language",
        "PathChange",
        "PtySessionInfo",
        "Result",
        "ToolCallEvent",
        "VariableChange",
        "VariableState",
        "VariablesDiff",
    ),
    "errors": (
        "BadRequest",
        "CallNotFound",
        "CellNotFound",
        "Conflict",
        "ConnectionLost",
        "DaemonStartFailed",
        "DaemonUnreachable",
        "DeadlineExceeded",
        "EgressUnavailable",
        "FileAccessError",
        "FileMissing",
        "Forbidden",
        "IsolationIncomplete",
        "MachineFailed",
        "MergeConflict",
        "NoCapacity",
        "NotBuilt",
        "PodflareError",
        "PodflareWarning",
        "ProtocolError",
        "QuotaExceeded",
        "SandboxEndingWarning",
        "SandboxNotFound",
        "SnapshotNotFound",
        "TemplateFailed",
        "TooLarge",
        "Unauthorized",
        "UnknownRegionError",
        "UnknownTemplate",
    ),
    "wire.api": ("ForkReport", "SandboxInfo", "SandboxUsage", "SnapshotInfo"),
    "wire.egress": ("EgressEntry", "EgressLog"),
    "wire.events": ("Event",),
    "wire.merges": ("ConflictInfo", "MergeReport", "MergeSide", "NotTransferable"),
}
"""Where each public name lives."""

_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "REGIONS",
    "AsyncClient",
    "AsyncPtyHandle",
    "AsyncPtyNamespace",
    "AsyncSandbox",
    "Attempt",
    "BadRequest",
    "CallNotFound",
    "CellError",
    "CellNotFound",
    "Client",
    "Conflict",
    "ConflictInfo",
    "ConnectionLost",
    "DaemonStartFailed",
    "DaemonUnreachable",
    "DeadlineExceeded",
    "Diff",
    "EgressEntry",
    "EgressLog",
    "EgressUnavailable",
    "Event",
    "ExecResult",
    "Exploration",
    "FileAccessError",
    "FileMissing",
    "Forbidden",
    "ForkReport",
    "IsolationIncomplete",
    "Language",
    "MachineFailed",
    "MergeConflict",
    "MergeReport",
    "MergeSide",
    "NoCapacity",
    "NotBuilt",
    "NotTransferable",
    "PathChange",
    "PodflareError",
    "PodflareWarning",
    "ProtocolError",
    "PtyHandle",
    "PtyNamespace",
    "PtySessionInfo",
    "QuotaExceeded",
    "RegionInfo",
    "Result",
    "Sandbox",
    "SandboxEndingWarning",
    "SandboxInfo",
    "SandboxNotFound",
    "SandboxUsage",
    "Secret",
    "SnapshotInfo",
    "SnapshotNotFound",
    "TemplateFailed",
    "TooLarge",
    "ToolCallEvent",
    "Unauthorized",
    "UnknownRegionError",
    "UnknownTemplate",
    "VariableChange",
    "VariableState",
    "VariablesDiff",
    "__version__",
    "close_default_client",
    "detect_local_region",
    "explore",
    "explore_async",
    "haversine_km",
    "nearest_region_to",
    "resolve_region",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name == "REGIONS":
        # Read anew each time: it is configuration, and importing must not fail where that is broken.
        return importlib.import_module("podflare.client._regions").configured_urls()
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"podflare.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
