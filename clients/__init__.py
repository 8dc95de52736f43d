"""Clients of `dspark.v1`: an async library and a command line. They know the wire, not the server."""

import sys
from pathlib import Path

# The generated wire code imports itself as `dspark.v1`; its root is the folder `proto`.
_WIRE = str(Path(__file__).resolve().parent.parent / "proto")
if _WIRE not in sys.path:
    sys.path.append(_WIRE)
