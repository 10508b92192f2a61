"""What short texts state, read wholly or not at all, and whether two of them state the same."""
