"""Our parameter paths and foreign names."""
