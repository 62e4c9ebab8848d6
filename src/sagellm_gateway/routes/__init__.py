"""One file a resource: handlers that decode by a dialect, ask the control plane, and write by a dialect."""
