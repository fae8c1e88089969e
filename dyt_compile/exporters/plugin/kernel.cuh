// One kernel for all forms: each input is read once, each output is written once.
//
// A tensor is seen as [rows][planes][columns]. Channels are the columns (channel last: one plane)
// or the planes (channels first). A thread keeps its columns and walks down the rows, so it loads
// its parameters once and no index is ever divided.
#pragma once

#include "core.cuh"

namespace dyt
{

constexpr int kTHREADS = 128;
constexpr int kACCESS_BYTES = 16;

// Elements that a thread takes at once: 16 bytes of the narrowest type.
template <typename T, typename Out>
constexpr int kWIDTH = kACCESS_BYTES / (sizeof(Out) < sizeof(T) ? sizeof(Out) : sizeof(T));

enum class Along : int
{
    kNothing, // one value for all
    kColumns,
    kPlanes
};

// One parameter. Absent: data is null, and its neutral value is taken.
struct Parameter
{
    void const* data{nullptr};
    Along along{Along::kNothing};
};

struct Arguments
{
    void const* x;
    void const* residual;
    void* y;
    void* sum;
    float const* y_scale;
    Parameter alpha, shift, gamma, beta;
    long long rows;
    long long planes;
    long long columns;
};

// `width` neighbours as they lie in memory: one element, or as many words as they fill.
template <typename T, int width>
struct Chunk
{
    static constexpr int kWORDS = width / kPER_WORD<T>;
    unsigned words[kWORDS];

    DYT_INLINE void load(T const* from)
    {
#pragma unroll
        for (int word = 0; word < kWORDS; word += 4)
        {
            uint4 const* const source = reinterpret_cast<uint4 const*>(from) + word / 4;
#if defined(__CUDA_ARCH__)
            uint4 const loaded = __ldg(source);
#else
            uint4 const loaded = *source;
#endif
            words[word] = loaded.x;
            words[word + 1] = loaded.y;
            words[word + 2] = loaded.z;
            words[word + 3] = loaded.w;
        }
    }
    DYT_INLINE void store(T* to) const
    {
#pragma unroll
        for (int word = 0; word < kWORDS; word += 4)
        {
            reinterpret_cast<uint4*>(to)[word / 4]
                = make_uint4(words[word], words[word + 1], words[word + 2], words[word + 3]);
        }
    }
    DYT_INLINE void widened(float (&to)[width]) const
    {
#pragma unroll
        for (int word = 0; word < kWORDS; ++word)
        {
            widen(words[word], to + word * kPER_WORD<T>, T{});
        }
    }
    DYT_INLINE void narrowed(float const (&from)[width])
    {
#pragma unroll
        for (int word = 0; word < kWORDS; ++word)
        {
            words[word] = narrow(from + word * kPER_WORD<T>, T{});
        }
    }
};

template <typename T>
struct Chunk<T, 1>
{
    T item;

    DYT_INLINE void load(T const* from)
    {
        item = *from;
    }
    DYT_INLINE void store(T* to) const
    {
        *to = item;
    }
    DYT_INLINE void widened(float (&to)[1]) const
    {
        to[0] = widen(item);
    }
    DYT_INLINE void narrowed(float const (&from)[1])
    {
        narrow(from[0], item);
    }
};

template <typename T, int width>
DYT_INLINE void load(void const* from, long long offset, float (&to)[width])
{
    Chunk<T, width> chunk;
    chunk.load(static_cast<T const*>(from) + offset);
    chunk.widened(to);
}

// The values of a parameter for the columns from `column` on, in the plane `plane`.
template <typename T, int width>
DYT_INLINE void load(
    Parameter const& parameter, float neutral, long long column, long long plane, float (&to)[width])
{
    T const* const data = static_cast<T const*>(parameter.data);
    if (data != nullptr && parameter.along == Along::kColumns)
    {
        load<T>(data, column, to);
        return;
    }
    float const value
        = data == nullptr ? neutral : widen(data[parameter.along == Along::kPlanes ? plane : 0]);
#pragma unroll
    for (int lane = 0; lane < width; ++lane)
    {
        to[lane] = value;
    }
}

template <typename Out>
constexpr bool kQUANTIZED = sizeof(Out) == 1;

// The parameters of a thread's columns; absent ones neutral.
template <typename T, int width>
struct Parameters
{
    float alpha[width], shift[width], gamma[width], beta[width];

    DYT_INLINE Parameters(Arguments const& arguments, long long column, long long plane)
    {
        load<float>(arguments.alpha, 1.0F, column, plane, alpha);
        load<float>(arguments.shift, 0.0F, column, plane, shift);
        load<T>(arguments.gamma, 1.0F, column, plane, gamma);
        load<T>(arguments.beta, 0.0F, column, plane, beta);
    }
};

// x + residual, rounded and written as Add gives it: that sum is then squashed.
template <typename T, int width>
DYT_INLINE void add(float (&x)[width], Chunk<T, width> const& residual, T* to)
{
    float added[width];
    residual.widened(added);
#pragma unroll
    for (int lane = 0; lane < width; ++lane)
    {
        x[lane] += added[lane];
    }
    Chunk<T, width> sum;
    sum.narrowed(x);
    sum.store(to);
    sum.widened(x);
}

template <typename T, typename Out, Squash squash, int width>
DYT_INLINE void squash_to(
    Out* to, float const (&x)[width], Parameters<T, width> const& parameters, float scale, float reciprocal)
{
    float y[width];
#pragma unroll
    for (int lane = 0; lane < width; ++lane)
    {
        float const value = squashed<squash, T>(x[lane], parameters.alpha[lane], parameters.shift[lane]);
        y[lane] = fmaf(value, parameters.gamma[lane], parameters.beta[lane]);
        if constexpr (kQUANTIZED<Out>)
        {
            y[lane] = divided(y[lane], scale, reciprocal);
        }
    }
    Chunk<Out, width> result;
    result.narrowed(y);
    result.store(to);
}

// What keeps memory busy are bytes on their way: a thread asks for two rows before it needs the
// first, but for no more than 64 bytes of x.
template <typename T, typename Out>
constexpr int kROWS_AT_ONCE = kWIDTH<T, Out> * sizeof(T) > 32 ? 1 : 2;
// Blocks that share the 65,536 registers of a multiprocessor, so that none is spilled: erf takes more.
// With the grid of launch.cuh that is within 2 % of the fastest that was timed for tanh (docs/gpu.md);
// with erf six blocks were timed, of which some kernels spill.
template <typename Out, Squash squash>
constexpr int kBLOCKS_AT_ONCE = (kQUANTIZED<Out> ? 4 : 6) - (squash == Squash::kErf ? 1 : 0);

// T: dtype of x, residual, sum, gamma, beta; Out: that of y; width: elements that a thread takes at
// once, 1 or kWIDTH. With width > 1 columns is a multiple of it and all pointers are aligned.
template <typename T, typename Out, Squash squash, bool residual, int width>
__device__ __forceinline__ void transform_rows(Arguments const& arguments)
{
    long long const column = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * width;
    if (column >= arguments.columns)
    {
        return;
    }
    constexpr int kROWS = kROWS_AT_ONCE<T, Out>;
    T const* const x = static_cast<T const*>(arguments.x);
    T const* const added = static_cast<T const*>(arguments.residual);
    float const scale = kQUANTIZED<Out> ? *arguments.y_scale : 1.0F;
    float const reciprocal = 1.0F / scale;
    long long const first_row = static_cast<long long>(blockIdx.y) * blockDim.y + threadIdx.y;
    long long const row_step = static_cast<long long>(gridDim.y) * blockDim.y;
    long long const row_size = arguments.planes * arguments.columns;
    long long const step = row_step * row_size;

    for (long long plane = blockIdx.z; plane < arguments.planes; plane += gridDim.z)
    {
        Parameters<T, width> const parameters{arguments, column, plane};
        long long offset = first_row * row_size + plane * arguments.columns + column;
#pragma unroll 1
        for (long long row = first_row; row < arguments.rows; row += kROWS * row_step)
        {
            Chunk<T, width> chunks[kROWS], residuals[kROWS];
#pragma unroll
            for (int each = 0; each < kROWS; ++each)
            {
                if (row + each * row_step < arguments.rows)
                {
                    chunks[each].load(x + offset + each * step);
                    if constexpr (residual)
                    {
                        residuals[each].load(added + offset + each * step);
                    }
                }
            }
#pragma unroll
            for (int each = 0; each < kROWS; ++each)
            {
                if (row + each * row_step < arguments.rows)
                {
                    float values[width];
                    chunks[each].widened(values);
                    if constexpr (residual)
                    {
                        add(values, residuals[each], static_cast<T*>(arguments.sum) + offset + each * step);
                    }
                    squash_to<T, Out, squash>(static_cast<Out*>(arguments.y) + offset + each * step, values,
                        parameters, scale, reciprocal);
                }
            }
            offset += kROWS * step;
        }
    }
}

template <typename T, typename Out, Squash squash, bool residual, int width>
__global__ void __launch_bounds__(kTHREADS, kBLOCKS_AT_ONCE<Out, squash>)
    transform(Arguments const arguments)
{
    transform_rows<T, Out, squash, residual, width>(arguments);
}

} // namespace dyt
