"""The losslessness proof: `python -m tests.lossless` prints the table, the tests run it smaller."""
