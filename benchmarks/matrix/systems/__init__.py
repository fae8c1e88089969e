"""The architectures of the matrix, one module a field; each holds a tuple SYSTEMS."""
