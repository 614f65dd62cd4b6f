"""Where what can be made again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """The folder `AO_CACHE`, else `ao` in the user's cache; it may not be there yet."""
    chosen = os.environ.get("AO_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ao"
