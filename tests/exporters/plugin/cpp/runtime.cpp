// The few calls of the CUDA runtime that the plugin makes, on the host: a launch runs every thread of
// the kernel, one after the other.
#include "launch.cuh"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <iterator>

extern "C"
{
    uint3 threadIdx, blockIdx;
    dim3 blockDim, gridDim;

    float tanh_error = 0.0F;
    int launch_status = 0;       // what the next launches return; 0 runs them
    long long last_blocks = -1;  // run only so many blocks, the last ones; -1: all
    unsigned launch_shape[6];    // grid x, y, z and block x, y, z of the last launch
    long long launches = 0;

    float emulated_tanh(float value)
    {
        return static_cast<float>(std::tanh(static_cast<double>(value)) * (1.0 + tanh_error));
    }

    cudaError_t CUDARTAPI cudaGetDevice(int* device)
    {
        *device = 0;
        return cudaSuccess;
    }
    cudaError_t CUDARTAPI cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int)
    {
        *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : 0;
        return attribute == cudaDevAttrMultiProcessorCount ? cudaSuccess : cudaErrorInvalidValue;
    }
    char const* CUDARTAPI cudaGetErrorString(cudaError_t)
    {
        return "the stub was told to fail";
    }
}

namespace
{

// As the device checks it: no extent is 0, and none above the limits.
bool possible(dim3 grid, dim3 block)
{
    bool const filled = grid.x && grid.y && grid.z && block.x && block.y && block.z;
    return filled && grid.x <= 0x7FFFFFFFU && grid.y <= 65535 && grid.z <= 65535 && block.x * block.y * block.z <= 1024;
}

void run_block(dyt::Kernel kernel, dyt::Arguments const& arguments)
{
    for (unsigned y = 0; y < blockDim.y; ++y)
    {
        for (unsigned x = 0; x < blockDim.x; ++x)
        {
            threadIdx = {x, y, 0};
            kernel(arguments);
        }
    }
}

} // namespace

extern "C" cudaError_t CUDARTAPI cudaLaunchKernel(
    void const* function, dim3 grid, dim3 block, void** pointers, std::size_t, cudaStream_t)
{
    if (launch_status != 0)
    {
        return static_cast<cudaError_t>(launch_status);
    }
    if (!possible(grid, block))
    {
        return cudaErrorInvalidConfiguration;
    }
    ++launches;
    unsigned const shape[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
    std::copy(std::begin(shape), std::end(shape), launch_shape);
    gridDim = grid;
    blockDim = block;
    auto const kernel = reinterpret_cast<dyt::Kernel>(const_cast<void*>(function));
    long long const blocks = static_cast<long long>(grid.x) * grid.y * grid.z;
    for (long long index = last_blocks < 0 ? 0 : std::max(0LL, blocks - last_blocks); index < blocks; ++index)
    {
        blockIdx = {static_cast<unsigned>(index % grid.x), static_cast<unsigned>(index / grid.x % grid.y),
            static_cast<unsigned>(index / grid.x / grid.y)};
        run_block(kernel, *static_cast<dyt::Arguments const*>(pointers[0]));
    }
    return cudaSuccess;
}
