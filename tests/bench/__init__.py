"""Speed, measured: `make bench`. Arms of a comparison run interleaved; ratios are ratios of medians."""
