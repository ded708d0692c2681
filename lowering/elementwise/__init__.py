"""Elementwise functions: one definition for vector and scalar code, in Inductor's kernels and in eager code."""
