"""Where rewards and judgements come from, and runs that learn from a model's own answers."""
