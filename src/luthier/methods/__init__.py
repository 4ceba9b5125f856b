"""What is added to the base, and what trains. One file a method; the file name is its kind."""
