"""Ours against TRL + PEFT on the same work, in one run: ``python -m benchmarks``.

Every peer runs in a process of its own on the same weights, token ids, labels, order, adapter start, optimizer and learning rate. Losses and
adapter gradients of step 1 are held against a plain fp32 reference before any speed is quoted.
"""
