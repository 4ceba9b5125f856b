"""Methods compared on the same data, seeds and budget: `luthier compare`. What is asked is in sweep.py, how the time is spent in budget.py and conduct.py."""
