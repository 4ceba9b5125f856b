"""What a run keeps of its base and what it knows; what is done against forgetting."""
