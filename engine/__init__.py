"""Decoding: drafting, scheduling, verifying, committing. Knows no transport, no event loop and no text."""

import os

# Long contexts read megabytes of keys and values a token; huge pages spare the address translation. PyTorch's CPU
# allocator looks at this once, at its first large allocation.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
