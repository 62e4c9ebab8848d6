"""The command line: one file a command; `main` loads only the one that is asked for."""
