"""The engine behind interfaces that other tools know."""
