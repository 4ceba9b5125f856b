"""How the frozen weights are stored. One file a precision; the file name is its kind."""
