"""What was found, for people and machines: as plain values, in a terminal, as a page."""
