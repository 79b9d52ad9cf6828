"""Which samples make a step, and who takes them."""
