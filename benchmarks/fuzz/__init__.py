"""Bad input by the ten thousand: python -m benchmarks.fuzz says what became of it."""
