"""Hostile messages against a real server: `make fuzz`."""

import server  # noqa: F401  # puts the wire code on the import path
