"""The command line: gin and one file per verb."""
