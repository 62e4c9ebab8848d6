"""What must survive a restart, in SQLite: stored responses, sessions, keys, usage, files, batches."""
