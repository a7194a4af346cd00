"""Tests neither read nor write the cache directory of whoever runs them."""

from __future__ import annotations

import os
import tempfile

# Before anything imports spfmt, and inherited by the processes that tests start.
_CACHE = tempfile.TemporaryDirectory(prefix="spfmt-cache-")
os.environ["SPFMT_CACHE_DIR"] = _CACHE.name
