"""What a run will take in memory and time, here and on other devices; which method, and what makes it fit."""
