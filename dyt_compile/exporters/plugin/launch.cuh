// From shapes and pointers to one launch of the kernel: which instance, which grid.
#pragma once

#include "kernel.cuh"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

namespace dyt
{

enum class Type
{
    kFloat,
    kHalf,
    kBFloat16,
    kInt8,
    kFloat8
};

using Kernel = void (*)(Arguments);

// resident: blocks of a multiprocessor that go through all rows; 0: as many as take them in one trip.
struct Instance
{
    Kernel kernel;
    int width, rows, resident;
};

template <typename T, typename Out, Squash squash, bool residual>
Instance by_width(bool wide)
{
    constexpr int kWIDE = kWIDTH<T, Out>;
    constexpr int kROWS = kROWS_AT_ONCE<T, Out>;
    constexpr int kRESIDENT = squash == Squash::kErf ? kBLOCKS_AT_ONCE<Out, squash> : 0;
    return wide ? Instance{transform<T, Out, squash, residual, kWIDE>, kWIDE, kROWS, kRESIDENT}
                : Instance{transform<T, Out, squash, residual, 1>, 1, kROWS, kRESIDENT};
}

template <typename T, typename Out>
Instance by_form(Squash squash, bool residual, bool wide)
{
    if (squash == Squash::kErf)
    {
        return residual ? by_width<T, Out, Squash::kErf, true>(wide) : by_width<T, Out, Squash::kErf, false>(wide);
    }
    return residual ? by_width<T, Out, Squash::kTanh, true>(wide) : by_width<T, Out, Squash::kTanh, false>(wide);
}

template <typename T>
Instance by_output(Type output, Squash squash, bool residual, bool wide)
{
    switch (output)
    {
    case Type::kInt8: return by_form<T, Int8>(squash, residual, wide);
    case Type::kFloat8: return by_form<T, Float8>(squash, residual, wide);
    default: return by_form<T, T>(squash, residual, wide);
    }
}

// The kernel for x of dtype `input` and y of dtype `output`, which is `input` or a quantized type.
inline Instance select(Type input, Type output, Squash squash, bool wide, bool residual)
{
    switch (input)
    {
    case Type::kFloat: return by_output<float>(output, squash, residual, wide);
    case Type::kHalf: return by_output<Half>(output, squash, residual, wide);
    default: return by_output<BFloat16>(output, squash, residual, wide);
    }
}

// Whether 16-byte accesses are possible everywhere.
inline bool is_wide(Arguments const& arguments, int width)
{
    std::uintptr_t bits = 0;
    for (void const* pointer : {arguments.x, arguments.residual, static_cast<void const*>(arguments.y),
             static_cast<void const*>(arguments.sum)})
    {
        bits |= reinterpret_cast<std::uintptr_t>(pointer);
    }
    for (Parameter const* each : {&arguments.alpha, &arguments.shift, &arguments.gamma, &arguments.beta})
    {
        bits |= each->along == Along::kColumns ? reinterpret_cast<std::uintptr_t>(each->data) : 0;
    }
    return bits % kACCESS_BYTES == 0 && arguments.columns % width == 0;
}

inline long long ceil_div(long long dividend, long long divisor)
{
    return (dividend + divisor - 1) / divisor;
}

struct Geometry
{
    dim3 grid, block;
};

// Blocks of at most kTHREADS: side by side over the columns, the rest of a block over the rows. With
// tanh every thread takes one trip, so that the last blocks to end are short. With erf it was faster
// that no more blocks than fit at once take as many trips as there are.
inline Geometry geometry(Arguments const& arguments, Instance const& instance, int multiprocessors)
{
    constexpr long long kLARGEST_GRID = 65535; // of y and z
    long long const columns = ceil_div(arguments.columns, instance.width);
    long long const across = ceil_div(columns, ceil_div(columns, kTHREADS));
    long long const down = std::min<long long>(kTHREADS / across, arguments.rows);
    long long const x = ceil_div(columns, across);
    long long const z = std::min(arguments.planes, kLARGEST_GRID);
    long long const all = ceil_div(arguments.rows, down * (instance.resident ? 1 : instance.rows));
    long long const at_once = ceil_div(multiprocessors * instance.resident, x * z);
    long long const y = std::min({instance.resident ? at_once : all, all, kLARGEST_GRID});
    auto const size = [](long long value) { return static_cast<unsigned>(value); };
    return {dim3(size(x), size(y), size(z)), dim3(size(across), size(down), 1)};
}

// Enqueue the kernel. arguments.rows, planes and columns are not 0.
inline cudaError_t launch(
    Arguments arguments, Type input, Type output, Squash squash, cudaStream_t stream)
{
    bool const residual = arguments.residual != nullptr;
    Instance instance = select(input, output, squash, true, residual);
    if (!is_wide(arguments, instance.width))
    {
        instance = select(input, output, squash, false, residual);
    }
    int device = 0;
    int multiprocessors = 0;
    cudaError_t status = cudaGetDevice(&device);
    if (status == cudaSuccess)
    {
        status = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    }
    if (status != cudaSuccess)
    {
        return status;
    }
    Geometry const shape = geometry(arguments, instance, multiprocessors);
    void* pointers[] = {&arguments};
    return cudaLaunchKernel(
        reinterpret_cast<void const*>(instance.kernel), shape.grid, shape.block, pointers, 0, stream);
}

} // namespace dyt
