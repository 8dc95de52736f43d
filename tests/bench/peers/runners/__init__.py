"""Programs that the peers' own Python runs: nothing here imports anything of ours but `protocol`."""
