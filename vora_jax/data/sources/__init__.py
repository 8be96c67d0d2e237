"""Random access to files of samples."""
