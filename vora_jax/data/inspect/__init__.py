"""Rows as a person would look at them."""
