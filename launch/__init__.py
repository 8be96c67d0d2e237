"""Starts `vora` on pods, clusters and fake devices: `python -m launch KIND`."""
