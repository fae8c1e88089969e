// The formula for one element, and the conversions around it: float32 inside, whatever the dtypes.
//
//   DyT(x)  = gamma * tanh(alpha * x) + beta           arXiv 2503.10622, equation 2
//   Derf(x) = gamma * erf(alpha * x + shift) + beta    arXiv 2512.10938
//
// All of it compiles for the host too, where the tests run it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#if !defined(__CUDACC_RTC__)
#include <cmath>
#endif

#define DYT_INLINE __host__ __device__ __forceinline__

namespace dyt
{

using Half = __half;
using BFloat16 = __nv_bfloat16;
using Int8 = signed char;
using Float8 = __nv_fp8_e4m3;

enum class Squash
{
    kTanh,
    kErf
};

// Stored types to float32, and back to nearest even: fp16 and bf16 overflow to infinity, INT8 and
// FP8 E4M3 saturate. One element at a time,
DYT_INLINE float widen(float value)
{
    return value;
}
DYT_INLINE float widen(Half value)
{
    return __half2float(value);
}
DYT_INLINE float widen(BFloat16 value)
{
    return __bfloat162float(value);
}

union Bits
{
    float number;
    unsigned bits;
};

DYT_INLINE void narrow(float value, float& to)
{
    to = value;
}
DYT_INLINE void narrow(float value, Half& to)
{
    to = __float2half_rn(value);
}
DYT_INLINE void narrow(float value, BFloat16& to)
{
    to = __float2bfloat16_rn(value);
}
DYT_INLINE void narrow(float value, Int8& to)
{
    // A float of the size of 1.5 * 2^23 has no bits below 1: adding it rounds to nearest even and
    // leaves the integer in the low bits. A NaN becomes -128.
    Bits const rounded{fminf(fmaxf(value, -128.0F), 127.0F) + 12582912.0F};
    to = static_cast<Int8>(rounded.bits);
}
DYT_INLINE void narrow(float value, Float8& to)
{
    to.__x = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

// or one word of four bytes at a time, for which there are instructions that convert pairs.
template <typename T>
constexpr int kPER_WORD = 4 / sizeof(T);

DYT_INLINE void widen(unsigned word, float* to, float)
{
    Bits bits;
    bits.bits = word;
    to[0] = bits.number;
}
DYT_INLINE void widen(unsigned word, float* to, Half)
{
    float2 const pair = __half22float2(*reinterpret_cast<__half2 const*>(&word));
    to[0] = pair.x;
    to[1] = pair.y;
}
DYT_INLINE void widen(unsigned word, float* to, BFloat16)
{
    Bits first, second; // bf16 is the upper half of a float32
    first.bits = word << 16;
    second.bits = word & 0xFFFF0000U;
    to[0] = first.number;
    to[1] = second.number;
}

DYT_INLINE unsigned narrow(float const* from, float)
{
    return Bits{from[0]}.bits;
}
DYT_INLINE unsigned narrow(float const* from, Half)
{
    __half2 const pair = __floats2half2_rn(from[0], from[1]);
    return *reinterpret_cast<unsigned const*>(&pair);
}
DYT_INLINE unsigned narrow(float const* from, BFloat16)
{
    __nv_bfloat162 const pair = __floats2bfloat162_rn(from[0], from[1]);
    return *reinterpret_cast<unsigned const*>(&pair);
}
DYT_INLINE unsigned narrow(float const* from, Int8)
{
    unsigned word = 0;
#pragma unroll
    for (int place = 0; place < 4; ++place)
    {
        Int8 item;
        narrow(from[place], item);
        word |= (static_cast<unsigned>(item) & 0xFFU) << (8 * place);
    }
    return word;
}
DYT_INLINE unsigned narrow(float const* from, Float8)
{
    unsigned const low = __nv_cvt_float2_to_fp8x2(make_float2(from[0], from[1]), __NV_SATFINITE, __NV_E4M3);
    unsigned const high = __nv_cvt_float2_to_fp8x2(make_float2(from[2], from[3]), __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
}

// The hardware's tanh: relative error at most 2^-11 (PTX ISA, tanh.approx.f32). On a host a test
// may define DYT_HARDWARE_TANH(value) to put any such error in its place.
DYT_INLINE float hardware_tanh(float value)
{
#if defined(__CUDA_ARCH__)
    float result;
    asm("tanh.approx.f32 %0, %1;" : "=f"(result) : "f"(value));
    return result;
#elif defined(DYT_HARDWARE_TANH)
    return DYT_HARDWARE_TANH(value);
#else
    return tanhf(value);
#endif
}

// T is the dtype of x: 2^-11 is one rounding of fp16 and an eighth of one of bf16, but 8192 of fp32,
// which takes tanhf (2 ulp) instead. erff (2 ulp) has no counterpart in hardware.
template <Squash squash, typename T>
DYT_INLINE float squashed(float x, float alpha, float shift)
{
    if (squash == Squash::kErf)
    {
        return erff(fmaf(alpha, x, shift));
    }
    return sizeof(T) == sizeof(float) ? tanhf(alpha * x) : hardware_tanh(alpha * x);
}

// value / scale, correctly rounded, with 1 / scale at hand (Markstein: one step of correction
// gives the quotient). Beyond 1024 every quantized type saturates, and a step might overflow.
DYT_INLINE float divided(float value, float scale, float reciprocal)
{
    float const quotient = value * reciprocal;
    float const corrected = fmaf(fmaf(-quotient, scale, value), reciprocal, quotient);
    return fabsf(quotient) < 1024.0F ? corrected : quotient;
}

} // namespace dyt
