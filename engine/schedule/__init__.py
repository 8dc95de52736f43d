"""Who drafts, how much is verified, who enters and who waits."""
