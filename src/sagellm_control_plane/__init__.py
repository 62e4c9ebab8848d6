"""Many engines: registry, policies, dispatch."""
