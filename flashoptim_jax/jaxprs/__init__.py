"""Traced programs, JAX's jaxprs: interpreted, rewritten and taken apart. Not public."""
