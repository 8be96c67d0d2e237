"""Sample models in other formats."""
