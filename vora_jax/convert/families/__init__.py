"""What a foreign configuration means."""
