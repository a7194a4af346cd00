"""CUDA kernels: structures as they want them, and the library that holds them.

Needs numpy alone; :mod:`spfmt.torch` calls the kernels on tensors.
"""
