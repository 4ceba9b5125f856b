"""A run on one page, and how its file, its options and the kinds they name are read: without torch."""
