"""Finding and rewriting norms in ONNX files: seconds, memory, and counts, against peers."""
