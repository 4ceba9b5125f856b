"""Answers: hidden states of the next position, caches, sampling."""
