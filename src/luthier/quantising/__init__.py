"""Bases in codes: quantising while reading, folders of codes, GPTQ over a whole model."""
