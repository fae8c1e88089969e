// The forms that the library knows, their inputs, and how a set of shapes is laid out for the kernel.
#pragma once

#include "launch.cuh"

#include <NvInferRuntime.h>

#include <array>
#include <string>
#include <vector>

namespace dyt
{

using nvinfer1::DataType;
using nvinfer1::Dims;

constexpr char const* kNAMESPACE = "dyt";
constexpr char const* kVERSION = "1";

enum class Input
{
    kX,
    kResidual,
    kAlpha,
    kShift,
    kGamma,
    kBeta,
    kScale
};

inline char const* name_of(Input input)
{
    constexpr char const* kNAMES[] = {"x", "residual", "alpha", "shift", "gamma", "beta", "y_scale"};
    return kNAMES[static_cast<int>(input)];
}

// One operator: its inputs in order. Outputs: y, and with a residual also sum.
struct Form
{
    std::string name;
    Squash squash;
    bool residual;
    bool quantize;
    std::vector<Input> inputs;

    int outputs() const
    {
        return residual ? 2 : 1;
    }
};

// DyT, AddDyT, DyTQuantize, AddDyTQuantize, and the same for DyTScale, DyTBare and Derf.
inline std::vector<Form> const& forms()
{
    static std::vector<Form> const kFORMS = [] {
        struct Base
        {
            char const* name;
            Squash squash;
            std::vector<Input> parameters;
        };
        Base const bases[] = {
            {"DyT", Squash::kTanh, {Input::kAlpha, Input::kGamma, Input::kBeta}},
            {"DyTScale", Squash::kTanh, {Input::kAlpha, Input::kGamma}},
            {"DyTBare", Squash::kTanh, {Input::kAlpha}},
            {"Derf", Squash::kErf, {Input::kAlpha, Input::kShift, Input::kGamma, Input::kBeta}},
        };
        std::vector<Form> made;
        for (bool quantize : {false, true})
        {
            for (bool residual : {false, true})
            {
                for (Base const& base : bases)
                {
                    Form form{(residual ? "Add" : "") + std::string(base.name) + (quantize ? "Quantize" : ""),
                        base.squash, residual, quantize, {Input::kX}};
                    if (residual)
                    {
                        form.inputs.push_back(Input::kResidual);
                    }
                    form.inputs.insert(form.inputs.end(), base.parameters.begin(), base.parameters.end());
                    if (quantize)
                    {
                        form.inputs.push_back(Input::kScale);
                    }
                    made.push_back(form);
                }
            }
        }
        return made;
    }();
    return kFORMS;
}

inline std::string text(Dims const& dims)
{
    std::string result = "[";
    for (int axis = 0; axis < dims.nbDims; ++axis)
    {
        result += (axis ? ", " : "") + (dims.d[axis] < 0 ? "?" : std::to_string(dims.d[axis]));
    }
    return result + "]";
}

// Where the kernel finds the channels. axis: that of x along which parameters vary; -1 for none.
// error: empty, or what is wrong with the shapes.
struct Layout
{
    int axis{-1};
    long long rows{1}, planes{1}, columns{1};
    std::array<Along, 7> along{}; // by Input
    std::string error;
};

inline bool same(int64_t size, int64_t other)
{
    return size == other || size < 0 || other < 0; // below 0: known at run time
}

inline void place(Layout& layout, Input input, Dims const& x, Dims const& shape)
{
    auto const wrong = [&](std::string const& allowed) {
        layout.error = std::string(name_of(input)) + " has shape " + text(shape) + " for x of shape " + text(x)
            + "; allowed: " + allowed;
    };
    if (input == Input::kResidual)
    {
        bool equal = shape.nbDims == x.nbDims;
        for (int axis = 0; equal && axis < x.nbDims; ++axis)
        {
            equal = same(shape.d[axis], x.d[axis]);
        }
        return equal ? void() : wrong("the shape of x");
    }
    for (int place = 0; place < shape.nbDims; ++place)
    {
        if (shape.d[place] == 1)
        {
            continue;
        }
        int const axis = x.nbDims - shape.nbDims + place;
        bool const fits = axis >= 0 && (layout.axis < 0 || layout.axis == axis) && same(shape.d[place], x.d[axis])
            && layout.along[static_cast<int>(input)] == Along::kNothing && input != Input::kScale;
        if (!fits)
        {
            return wrong(input == Input::kScale ? "[] or [1]" : "[1], or one axis of x, the same for all parameters");
        }
        layout.axis = axis;
        layout.along[static_cast<int>(input)] = axis + 1 == x.nbDims ? Along::kColumns : Along::kPlanes;
    }
}

// shapes: those of the form's inputs, in order.
inline Layout layout_of(Form const& form, std::vector<Dims> const& shapes)
{
    Layout layout;
    Dims const& x = shapes.front();
    for (std::size_t place = 1; place < shapes.size() && layout.error.empty(); ++place)
    {
        dyt::place(layout, form.inputs[place], x, shapes[place]);
    }
    bool const last = layout.axis == x.nbDims - 1;
    for (int axis = 0; axis < x.nbDims; ++axis)
    {
        // Without an axis all of x is one row; else what comes before it are rows.
        bool const outside = axis < layout.axis;
        bool const plane = axis == layout.axis && !last;
        (outside ? layout.rows : plane ? layout.planes : layout.columns) *= x.d[axis];
    }
    return layout;
}

} // namespace dyt
