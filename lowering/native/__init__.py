"""The C++ side of the CPU lowerings: vectors, tensors, and the build."""

from .build import NativeBuildError, cache_dir, isa, libraries, library_path, load

__all__ = ["NativeBuildError", "cache_dir", "isa", "libraries", "library_path", "load"]
