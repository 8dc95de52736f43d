"""Many hours of traffic in a few minutes: `make soak`."""

import server  # noqa: F401  # puts the wire code on the import path
