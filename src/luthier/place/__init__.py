"""Where a run lives: devices and ranks. One file a place; the file name is its kind."""
