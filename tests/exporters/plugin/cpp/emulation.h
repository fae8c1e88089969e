// Included before the plugin's sources, so that a host compiler takes them.
#pragma once

#include <vector_types.h>

extern "C"
{
    // Where the kernel finds itself; the stub of the runtime sets it.
    extern uint3 threadIdx, blockIdx;
    extern dim3 blockDim, gridDim;

    // tanh with the relative error that a test sets: what MUFU.TANH may do, which no host can run.
    float emulated_tanh(float value);
}

#define DYT_HARDWARE_TANH(value) emulated_tanh(value)
#define __launch_bounds__(...)
#define __CUDA_ARCH_LIST__ 0
