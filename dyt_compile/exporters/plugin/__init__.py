"""The TensorRT plugin: its CUDA C++ sources, and what compiles and describes them."""
