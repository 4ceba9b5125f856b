"""Several runs in one file: read, tried, run, kept, reported."""
