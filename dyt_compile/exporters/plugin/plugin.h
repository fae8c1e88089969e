// One plugin class for all forms, as TensorRT leads it from the builder to enqueue.
#pragma once

#include "forms.h"

#include <atomic>
#include <cstdio>
#include <exception>

namespace dyt
{

using namespace nvinfer1;

inline std::atomic<ILoggerFinder*> logger_finder{nullptr};

// To TensorRT's logger where it gave one, which it does for version-compatible engines alone.
inline void log_error(Form const& form, std::string const& message)
{
    std::string const line = "dyt::" + form.name + ": " + message;
    ILoggerFinder* const finder = logger_finder;
    ILogger* const logger = finder ? finder->findLogger() : nullptr;
    if (logger)
    {
        logger->log(ILogger::Severity::kERROR, line.c_str());
    }
    else
    {
        std::fprintf(stderr, "%s\n", line.c_str());
    }
}

// What TensorRT calls must not throw: -1, or null, stands for the error that was logged.
template <typename Result, typename Call>
Result guarded(Form const& form, Result failed, Call call) noexcept
{
    try
    {
        return call();
    }
    catch (std::exception const& error)
    {
        log_error(form, error.what());
        return failed;
    }
}

inline Type type_of(DataType type)
{
    switch (type)
    {
    case DataType::kHALF: return Type::kHalf;
    case DataType::kBF16: return Type::kBFloat16;
    case DataType::kINT8: return Type::kInt8;
    case DataType::kFP8: return Type::kFloat8;
    default: return Type::kFloat;
    }
}

// The field output_dtype of the quantized forms: values of ONNX's TensorProto.DataType.
constexpr char const* kOUTPUT_DTYPE = "output_dtype";
constexpr int32_t kONNX_INT8 = 3;
constexpr int32_t kONNX_FLOAT8E4M3FN = 17;

class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime
{
public:
    // output_dtype: one of the two above for a quantized form; else not read.
    Plugin(Form const& form, int32_t output_dtype)
        : form_{form}
        , output_dtype_{output_dtype}
        , field_{kOUTPUT_DTYPE, &output_dtype_, PluginFieldType::kINT32, 1}
        , fields_{form.quantize ? 1 : 0, &field_}
    {
    }
    Plugin(Plugin const&) = delete;
    Plugin& operator=(Plugin const&) = delete;

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override
    {
        switch (type)
        {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }
    IPluginV3* clone() noexcept override
    {
        return guarded<IPluginV3*>(form_, nullptr, [this] { return new Plugin(form_, output_dtype_); });
    }

    AsciiChar const* getPluginName() const noexcept override
    {
        return form_.name.c_str();
    }
    AsciiChar const* getPluginVersion() const noexcept override
    {
        return kVERSION;
    }
    AsciiChar const* getPluginNamespace() const noexcept override
    {
        return kNAMESPACE;
    }

    int32_t getNbOutputs() const noexcept override
    {
        return form_.outputs();
    }
    int32_t getOutputDataTypes(
        DataType* outputs, int32_t output_count, DataType const* inputs, int32_t input_count) const noexcept override
    {
        if (!takes(input_count))
        {
            return -1;
        }
        for (int32_t place = 0; place < output_count; ++place)
        {
            outputs[place] = output_type(place, inputs[0]);
        }
        return 0;
    }
    int32_t getOutputShapes(DimsExprs const* inputs, int32_t input_count, DimsExprs const*, int32_t,
        DimsExprs* outputs, int32_t output_count, IExprBuilder&) noexcept override
    {
        if (!takes(input_count))
        {
            return -1;
        }
        for (int32_t place = 0; place < output_count; ++place)
        {
            outputs[place] = inputs[0];
        }
        return 0;
    }
    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t input_count,
        int32_t) noexcept override
    {
        PluginTensorDesc const& tensor = tensors[position].desc;
        DataType const x = tensors[0].desc.type;
        return tensor.format == TensorFormat::kLINEAR && tensor.type == wanted_type(position, input_count, x);
    }
    int32_t configurePlugin(DynamicPluginTensorDesc const* inputs, int32_t input_count,
        DynamicPluginTensorDesc const*, int32_t) noexcept override
    {
        return checked(inputs, input_count, [](DynamicPluginTensorDesc const& tensor) { return tensor.desc.dims; });
    }

    int32_t onShapeChange(
        PluginTensorDesc const* inputs, int32_t input_count, PluginTensorDesc const*, int32_t) noexcept override
    {
        return checked(inputs, input_count, [](PluginTensorDesc const& tensor) { return tensor.dims; });
    }
    int32_t enqueue(PluginTensorDesc const* input_tensors, PluginTensorDesc const* output_tensors,
        void const* const* inputs, void* const* outputs, void*, cudaStream_t stream) noexcept override
    {
        return guarded<int32_t>(form_, -1, [&] {
            Layout const layout
                = laid_out(input_tensors, [](PluginTensorDesc const& tensor) { return tensor.dims; });
            if (layout.rows * layout.planes * layout.columns == 0)
            {
                return 0;
            }
            cudaError_t const status = launch(arguments(layout, inputs, outputs), type_of(input_tensors[0].type),
                type_of(output_tensors[0].type), form_.squash, stream);
            if (status != cudaSuccess)
            {
                log_error(form_, std::string("the kernel was not launched: ") + cudaGetErrorString(status));
            }
            return status == cudaSuccess ? 0 : -1;
        });
    }
    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override
    {
        return clone();
    }
    PluginFieldCollection const* getFieldsToSerialize() noexcept override
    {
        return &fields_;
    }

private:
    bool takes(int32_t input_count) const noexcept
    {
        bool const right = input_count == static_cast<int32_t>(form_.inputs.size());
        if (!right)
        {
            guarded<int>(form_, -1, [&] {
                std::string names;
                for (Input input : form_.inputs)
                {
                    names += (names.empty() ? "" : ", ") + std::string(name_of(input));
                }
                log_error(form_, std::to_string(input_count) + " inputs are given; it takes " + names);
                return 0;
            });
        }
        return right;
    }

    DataType output_type(int32_t place, DataType x) const noexcept
    {
        if (place == 1 || !form_.quantize)
        {
            return x;
        }
        return output_dtype_ == kONNX_INT8 ? DataType::kINT8 : DataType::kFP8;
    }

    DataType wanted_type(int32_t position, int32_t input_count, DataType x) const noexcept
    {
        if (position >= input_count)
        {
            return output_type(position - input_count, x);
        }
        switch (form_.inputs[position])
        {
        case Input::kX:
            return x == DataType::kHALF || x == DataType::kBF16 ? x : DataType::kFLOAT;
        case Input::kAlpha:
        case Input::kShift:
        case Input::kScale: return DataType::kFLOAT;
        default: return x;
        }
    }

    template <typename Tensor, typename DimsOf>
    Layout laid_out(Tensor const* inputs, DimsOf dims_of) const
    {
        std::vector<Dims> shapes;
        for (std::size_t place = 0; place < form_.inputs.size(); ++place)
        {
            shapes.push_back(dims_of(inputs[place]));
        }
        return layout_of(form_, shapes);
    }

    template <typename Tensor, typename DimsOf>
    int32_t checked(Tensor const* inputs, int32_t input_count, DimsOf dims_of) const noexcept
    {
        return guarded<int32_t>(form_, -1, [&] {
            if (!takes(input_count))
            {
                return -1;
            }
            Layout const layout = laid_out(inputs, dims_of);
            if (!layout.error.empty())
            {
                log_error(form_, layout.error);
            }
            return layout.error.empty() ? 0 : -1;
        });
    }

    Arguments arguments(Layout const& layout, void const* const* inputs, void* const* outputs) const
    {
        Arguments made{};
        made.y = outputs[0];
        made.sum = form_.residual ? outputs[1] : nullptr;
        made.rows = layout.rows;
        made.planes = layout.planes;
        made.columns = layout.columns;
        for (std::size_t place = 0; place < form_.inputs.size(); ++place)
        {
            Input const input = form_.inputs[place];
            Parameter const parameter{inputs[place], layout.along[static_cast<int>(input)]};
            switch (input)
            {
            case Input::kX: made.x = inputs[place]; break;
            case Input::kResidual: made.residual = inputs[place]; break;
            case Input::kAlpha: made.alpha = parameter; break;
            case Input::kShift: made.shift = parameter; break;
            case Input::kGamma: made.gamma = parameter; break;
            case Input::kBeta: made.beta = parameter; break;
            case Input::kScale: made.y_scale = static_cast<float const*>(inputs[place]); break;
            }
        }
        return made;
    }

    Form const& form_; // lives as long as the library
    int32_t const output_dtype_;
    PluginField const field_;
    PluginFieldCollection const fields_;
};

} // namespace dyt
