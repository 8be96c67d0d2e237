"""Sample sets into the common format."""
