"""Decoding: drafting, scheduling, verifying, committing. Knows no transport, no event loop and no text."""
