"""Devices and ranks: what torchrun said, collectives, who is missing, a base laid out over ranks."""
