"""A run from its settings to what it saves, and what a person sees of it."""
