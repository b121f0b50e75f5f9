"""`python -m podflare` is the `podflare` command."""

from __future__ import annotations

import sys

from podflare.cli import main

sys.exit(main())
