"""Carries the core's commands out: dispatch, probes, lifecycle drivers, store. The only part with a clock and sockets."""
