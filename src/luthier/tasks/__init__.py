"""Benchmarks, one a file: the same object scores in evaluation and rewards in PPO and GRPO."""
