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

// float32 to the stored type, two neighbours at a time where one instruction converts two.
// To nearest even; fp16 and bf16 overflow to infinity, INT8 and FP8 E4M3 saturate.
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
    // Added to 1.5 * 2^23, a float of this size has no bits below 1: the addition rounds to nearest
    // even and leaves the integer in the low bits. A NaN becomes -128.
    union
    {
        float number;
        int bits;
    } rounded;
    rounded.number = fminf(fmaxf(value, -128.0F), 127.0F) + 12582912.0F;
    to = static_cast<Int8>(rounded.bits);
}
DYT_INLINE void narrow(float value, Float8& to)
{
    to.__x = __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3);
}

template <typename T>
DYT_INLINE void narrow_pair(float first, float second, T* to)
{
    narrow(first, to[0]);
    narrow(second, to[1]);
}
DYT_INLINE void narrow_pair(float first, float second, Half* to)
{
    __half2 const pair = __floats2half2_rn(first, second);
    to[0] = pair.x;
    to[1] = pair.y;
}
DYT_INLINE void narrow_pair(float first, float second, BFloat16* to)
{
    __nv_bfloat162 const pair = __floats2bfloat162_rn(first, second);
    to[0] = pair.x;
    to[1] = pair.y;
}
DYT_INLINE void narrow_pair(float first, float second, Float8* to)
{
    __nv_fp8x2_storage_t const pair
        = __nv_cvt_float2_to_fp8x2(make_float2(first, second), __NV_SATFINITE, __NV_E4M3);
    to[0].__x = static_cast<__nv_fp8_storage_t>(pair & 0xFF);
    to[1].__x = static_cast<__nv_fp8_storage_t>(pair >> 8);
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
