"""Templates of this engine: those whose image has been built."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from podflare.engines.microvm.image.build import guest_digest
from podflare.engines.microvm.image.store import Image, ImageStore
from podflare.errors import TemplateFailed, UnknownTemplate
from podflare.wire.api import TemplateInfo


@functools.cache
def _guest() -> str:
    """Of the guest in this version of podflare; reads it once."""
    return guest_digest()


class Images:
    """A directory of images, read again at each use."""

    def __init__(self, folder: str) -> None:
        """Args: folder: empty: there are none."""
        self._store = ImageStore(Path(folder)) if folder else None
        self._held: dict[str, int] = {}
        """Checksum -> lock on the files of an image in use: without its root no machine of it could be forked."""

    @property
    def names(self) -> tuple[str, ...]:
        return self._store.names() if self._store is not None else ()

    def get(self, template: str) -> Image:
        """Blocks.  Raises: UnknownTemplate with what there is; TemplateFailed."""
        if self._store is None or template not in self.names:
            known = ", ".join(self.names) or "none; podflare image build makes the default one"
            raise UnknownTemplate(f"no image of template {template!r:.80} has been built; there is: {known}")
        return self._store.get(template, guest=_guest())

    def take(self, template: str) -> Image:
        """As `get`, and its files stay until `release`.  Raises: OSError, too."""
        image = self.get(template)
        if self._store is not None and image.checksum not in self._held:
            self._held[image.checksum] = self._store.hold(image)
        return image

    def release(self) -> None:
        """Images may go.  Idempotent."""
        while self._held:
            os.close(self._held.popitem()[1])

    def describe(self, template: str) -> TemplateInfo:
        """As Engine.describe."""
        try:
            manifest = self.get(template).manifest
        except TemplateFailed as exc:
            return TemplateInfo(template, problem=str(exc))
        return TemplateInfo(
            template,
            description=f"Debian with Linux {manifest.kernel} in a virtual machine",
            version=manifest.checksum[:16],
            python=manifest.python.partition("-")[0],
            packages=dict(manifest.wheels),
            built_at_ms=manifest.built_at_ms,
            size_bytes=manifest.size_bytes,
        )
