// The plugin's kernel without TensorRT: what its enqueue calls, for ctypes.
#include "launch.cuh"

extern "C" int dyt_launch(dyt::Arguments const* arguments, int input, int output, int squash, cudaStream_t stream)
{
    auto const type = [](int value) { return static_cast<dyt::Type>(value); };
    return dyt::launch(*arguments, type(input), type(output), static_cast<dyt::Squash>(squash), stream);
}
