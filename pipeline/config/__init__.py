"""The config: typed sections, read from YAML and the command line."""
