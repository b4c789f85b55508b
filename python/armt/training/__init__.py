"""Training small models from scratch with PyTorch (extra "torch"): plain and readable."""
