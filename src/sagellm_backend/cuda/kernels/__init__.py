"""Triton kernels, one file a concern, and the functions that launch them.

With ``TRITON_INTERPRET=1`` they run on the CPU under Triton's interpreter, which is how they are tested without a GPU. What the
interpreter cannot show is what the compiler makes of them: register use, speed, fused arithmetic.
"""
