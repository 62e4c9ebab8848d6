"""isagellm: the umbrella. What a person touches: the client and the command line."""
