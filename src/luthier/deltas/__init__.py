"""What methods share: edits of outputs, low-rank pairs, vectors put before, stand-ins for weights, and the layouts of the field's adapter folders."""
