"""Kernels in Cython: hot loops without the GIL."""
