"""A checkpoint compared with its export."""
