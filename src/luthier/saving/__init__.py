"""What stays on disk of a model: adapter folders, merged and combined models, checkpoints, tensors that lie over ranks."""
