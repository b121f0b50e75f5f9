"""Bodies of a three-way merge: what is asked for, what it did or would do, and every limit on them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Dict, Optional, Tuple

from podflare.errors import BadRequest
from podflare.wire.api import DIFF_PATHS, MAX_LIFETIME_S, normal_path
from podflare.wire.codec import Fields
from podflare.wire.messages import MAX_PATH_CHARS
from podflare.wire.variables import MAX_VARIABLES, is_told

FILE, VARIABLE = KINDS = ("file", "variable")
OURS, THEIRS = SIDES = ("ours", "theirs")
ERROR = "error"
ON_CONFLICT = (ERROR, OURS, THEIRS)
DEFAULT_MERGE_TIMEOUT_S = 50.0
"""Below the 60 s after which a client gives up on a silent answer."""
MAX_MERGE_PATHS = 64
MAX_RESOLUTIONS = 100_000


@dataclass(frozen=True)
class MergeSide:
    """What one of the two has."""

    type: str
    """Of a file its kind; of a variable the name of its type."""
    size: Optional[int] = None
    """Bytes, where it has a size."""


@dataclass(frozen=True)
class ConflictInfo:
    """A file or variable that both changed, and not alike."""

    kind: str
    """"file" or "variable"."""
    name: str
    """The path, or the name."""
    why: str
    ours: Optional[MergeSide] = None
    """What the sandbox has that is to get the changes; None if it has none."""
    theirs: Optional[MergeSide] = None
    version: str = ""
    """Says what both sides have: a resolution is for this and no later one."""
    resolution: Optional[str] = None
    """"ours" or "theirs", once it is decided."""


@dataclass(frozen=True)
class NotTransferable:
    """Something that the other one changed and that cannot be anybody else's."""

    kind: str
    name: str
    """Empty for variables that are only counted, in `why`."""
    type: str
    why: str


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, or with `applied` false what it would do once its conflicts are resolved."""

    applied: bool
    files: Tuple[str, ...] = ()
    """Paths that changed in the sandbox; sorted."""
    variables: Tuple[str, ...] = ()
    """Variables that were set or deleted in it; sorted."""
    conflicts: Tuple[ConflictInfo, ...] = ()
    """With their resolution, if they have one."""
    not_transferable: Tuple[NotTransferable, ...] = ()

    @property
    def unresolved(self) -> Tuple[ConflictInfo, ...]:
        """The conflicts that nothing decided."""
        return tuple(item for item in self.conflicts if item.resolution is None)

    def to_json(self) -> Dict[str, Any]:
        return {
            "merged": {"files": list(self.files), "variables": list(self.variables)},
            "conflicts": [asdict(item) for item in self.conflicts],
            "not_transferable": [asdict(item) for item in self.not_transferable],
            "applied": self.applied,
        }


@dataclass(frozen=True)
class Resolution:
    """Which side is right in one conflict."""

    kind: str
    name: str
    resolution: str
    version: str = ""
    """Of the conflict as it was decided on; if it is another one by now, the resolution does not count.  Empty: any."""

    @classmethod
    def from_json(cls, body: Any) -> "Resolution":
        read = _object(body, "each of 'resolutions'")
        found = cls(
            kind=read.text("kind", max_chars=16),
            name=read.text("name", max_chars=MAX_PATH_CHARS),
            resolution=read.text("resolution", max_chars=16),
            version=read.text("version", max_chars=128, default=""),
        )
        if found.kind not in KINDS:
            raise read.fail("kind", "one of " + ", ".join(KINDS))
        if found.resolution not in SIDES:
            raise read.fail("resolution", "one of " + ", ".join(SIDES))
        return found


@dataclass(frozen=True)
class MergeRequest:
    """Body of POST /v1/sandboxes/{id}/merge/{other}."""

    paths: Tuple[str, ...] = DIFF_PATHS
    """Whose changes are brought over; absolute, without `.`, `..` and doubled slashes.  Empty: no files."""
    variables: bool = True
    """Whether changes of variables are brought over."""
    names: Optional[Tuple[str, ...]] = None
    """Of these variables only, and each has to be transferable; None for all."""
    on_conflict: str = ERROR
    resolutions: Tuple[Resolution, ...] = ()
    timeout_seconds: float = DEFAULT_MERGE_TIMEOUT_S
    """For all of it: waiting for running cells, and the merge."""

    @classmethod
    def from_json(cls, body: Dict[str, Any]) -> "MergeRequest":
        """Raises: BadRequest that names the key and what it must be."""
        read = _object(body, "merge request")
        files, variables = (_flag_or_texts(read, key) for key in ("files", "variables"))
        paths = (
            DIFF_PATHS
            if files is True
            else ()
            if files is False
            else tuple(normal_path(path, "merge request: each of 'files'") for path in files)
        )
        if len(paths) > MAX_MERGE_PATHS:
            raise BadRequest(f"merge request: {len(paths)} files, the cap is {MAX_MERGE_PATHS}")
        names = None if isinstance(variables, bool) else tuple(dict.fromkeys(variables))
        if names is not None and not (len(names) <= MAX_VARIABLES and all(is_told(name) for name in names)):
            raise read.fail("variables", f"true, false or at most {MAX_VARIABLES} names of variables")
        on_conflict = read.text("on_conflict", max_chars=16, default=ERROR)
        if on_conflict not in ON_CONFLICT:
            raise read.fail("on_conflict", "one of " + ", ".join(ON_CONFLICT))
        resolutions = body.get("resolutions") or []
        if not isinstance(resolutions, list) or len(resolutions) > MAX_RESOLUTIONS:
            raise read.fail("resolutions", f"a list of at most {MAX_RESOLUTIONS}")
        timeout = read.optional_number("timeout_seconds", low=0.001, high=MAX_LIFETIME_S)
        return cls(
            paths=paths,
            variables=variables is not False and names != (),
            names=names,
            on_conflict=on_conflict,
            resolutions=tuple(Resolution.from_json(item) for item in resolutions),
            timeout_seconds=DEFAULT_MERGE_TIMEOUT_S if timeout is None else timeout,
        )


def _object(body: Any, what: str) -> Fields:
    if not isinstance(body, dict):
        raise BadRequest(f"{what} must be an object, got {type(body).__name__}")
    return Fields(body, error=BadRequest, what=what)


def _flag_or_texts(read: Fields, key: str) -> Any:
    value = read.value(key)
    if value is None or isinstance(value, bool):
        return value is not False
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise read.fail(key, "true, false or a list of strings")
    return value
