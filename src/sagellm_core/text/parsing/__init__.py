"""What a model writes besides text: reasoning and tool calls. Incremental state machines that take linear time.

The pieces that a parser gives, joined, do not depend on how its input was cut.
"""
