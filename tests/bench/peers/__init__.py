"""Peers on the same work in one run: each in a process and an environment of its own."""
