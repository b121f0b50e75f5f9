"""Promise: the protocol's document and its constants say the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from podflare.errors import ProtocolError
from podflare.wire import frames, messages
from podflare.wire.version import PROTOCOL, check_protocol

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "protocol.md"


def test_document_has_the_protocols_number():
    """docs/protocol.md states the version number of wire/version.py."""
    assert re.findall(r"^Version: (\d+)$", DOCUMENT.read_text(), re.MULTILINE) == [str(PROTOCOL)]


def test_document_names_every_message_and_kind():
    """Each op and each frame kind of the code is in the document's tables."""
    text = DOCUMENT.read_text()
    for message in (*messages._HOST, *messages._GUEST):
        assert f"| `{message}` |" in text, message
    for kind in ("MESSAGE", "STDOUT", "STDERR", "DATA"):
        assert f"| {getattr(frames, kind)} | {kind} |" in text


@pytest.mark.parametrize("theirs", [0, 2, -1, "1", None, True, 1.5, [1]])
def test_other_versions_are_refused(theirs):
    """A peer of another version, or with something that is no version, is refused with both numbers named."""
    with pytest.raises(ProtocolError, match=f"this host speaks {PROTOCOL}"):
        check_protocol(theirs)


def test_own_version_is_accepted():
    """A peer of the same version is accepted."""
    assert check_protocol(PROTOCOL) == PROTOCOL
