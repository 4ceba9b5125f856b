"""Pure mathematics on tensors. Imports only torch (and numpy)."""
