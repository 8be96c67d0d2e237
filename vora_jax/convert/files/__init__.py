"""Safetensors files and folders."""
