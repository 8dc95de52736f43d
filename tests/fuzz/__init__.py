"""Hostile messages against a real server: `make fuzz`."""
