"""`python -m server`: load, listen, serve, drain."""

from __future__ import annotations

import sys

from engine.errors import LoadError
from server import logs, options
from server.address import probe_address


def main(arguments: list[str] | None = None) -> int:
    """Serves until told to stop. Returns 0, or 2 when serving could not start."""
    try:
        chosen = options.parse(arguments)
        logs.configure(chosen.log_level)
        probe_address(chosen.host, chosen.port)
        if isinstance(chosen.admin, tuple):
            probe_address(*chosen.admin)
        from server.app import serve  # takes seconds to import: only for a command line that can be served

        return serve(chosen)
    except LoadError as error:
        print(f"server: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
