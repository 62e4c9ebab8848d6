"""Discrete-event driver of the very objects that serve: same state machine, same policies, simulated engines and clock."""
