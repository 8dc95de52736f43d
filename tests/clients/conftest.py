"""The service's fixtures: a scripted server in this process."""

from tests.server.conftest import checkpoint, directory, launch, vocab_size

__all__ = ["checkpoint", "directory", "launch", "vocab_size"]
