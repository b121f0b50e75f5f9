"""What a merge of files that failed inside a machine is for whoever asked for it, on each engine."""

from __future__ import annotations

from podflare.errors import Conflict, DeadlineExceeded, MachineFailed, PodflareError, TooLarge


def failure(text: object, kind: object) -> PodflareError:
    """Args: text, kind: as guest/process/filemerge.py tells them; the text is fit to be shown."""
    told = f"the sandboxes' files could not be merged: {text}"
    if kind == "changed":
        return Conflict(f"{told}; nothing has changed, try again")
    if kind == "too_much":
        return TooLarge(told)
    if kind == "time":
        return DeadlineExceeded(f"{told}; nothing has changed")
    return MachineFailed(told)
