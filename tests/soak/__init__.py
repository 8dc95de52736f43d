"""Many hours of traffic in a few minutes: `make soak`."""
