"""What the loss is. One file an objective; the file name is its kind."""
