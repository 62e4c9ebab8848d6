"""The move from `isage-llm-core`, `isage-llm-gateway` and isagellm 0.1 - 0.5: codemod, architecture checker, forwarding modules.

`table` is the one source of truth: the codemod, the shim distributions, the guide in docs/migration.md and its test all
read it.
"""
