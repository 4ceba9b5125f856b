"""Models one after the other over tasks and data: luthier eval."""
