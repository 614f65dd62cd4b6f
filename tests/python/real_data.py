"""Where the real data sets lie that some tests try; they are no part of the repository."""

import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("AO_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))

needed = pytest.mark.skipif(not FOLDER.is_dir(), reason="the real data sets are not here (AO_SHARED_DATA)")
