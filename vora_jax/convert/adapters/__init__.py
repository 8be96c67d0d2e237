"""The papers' own adapter files, read."""
