"""How fast the forms of a model run beside the original, by runtime, in interleaved pairs."""
