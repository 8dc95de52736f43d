"""Rounds whose values stay on the device: a graph replays them, the host reads each one round late."""
