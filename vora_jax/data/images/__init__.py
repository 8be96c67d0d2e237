"""Picture files as patches."""
