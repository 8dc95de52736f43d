"""Target model families, one file each."""
