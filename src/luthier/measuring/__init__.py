"""Scores of a model over rows, with counts and intervals."""
