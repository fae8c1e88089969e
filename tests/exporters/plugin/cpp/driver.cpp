// The life of a plugin as TensorRT leads it, from the creator to one enqueue, for ctypes.
#include <NvInferRuntime.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

using namespace nvinfer1;

extern "C" IPluginCreatorInterface* const* getCreators(int32_t& count);
extern "C" void setLoggerFinder(ILoggerFinder* finder);

struct Tensor
{
    int32_t type;
    int32_t format; // 0: linear
    int32_t rank;
    int64_t dims[8];
    int64_t build_dims[8]; // -1 where dynamic
    void* data;
};

namespace
{

std::string messages;

struct Log : ILogger
{
    void log(Severity severity, AsciiChar const* message) noexcept override
    {
        messages += std::string(severity == Severity::kERROR ? "" : "not an error: ") + message + "\n";
    }
} logger;

struct Finder : ILoggerFinder
{
    ILogger* findLogger() override
    {
        return &logger;
    }
} finder;

struct Size : IDimensionExpr
{
};
struct Expressions : IExprBuilder
{
};

Dims dims_of(int32_t rank, int64_t const* sizes)
{
    Dims dims{};
    dims.nbDims = rank;
    std::copy(sizes, sizes + rank, dims.d);
    return dims;
}

PluginTensorDesc described(Tensor const& tensor, bool built)
{
    PluginTensorDesc desc{};
    desc.dims = dims_of(tensor.rank, built ? tensor.build_dims : tensor.dims);
    desc.type = static_cast<DataType>(tensor.type);
    desc.format = static_cast<TensorFormat>(tensor.format);
    return desc;
}

IPluginCreatorV3One* creator_of(char const* name)
{
    int32_t count = 0;
    IPluginCreatorInterface* const* const all = getCreators(count);
    for (int32_t place = 0; place < count; ++place)
    {
        if (std::strcmp(all[place]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") != 0)
        {
            continue;
        }
        auto* const creator = static_cast<IPluginCreatorV3One*>(all[place]);
        bool const ours = std::strcmp(creator->getPluginNamespace(), "dyt") == 0
            && std::strcmp(creator->getPluginVersion(), "1") == 0;
        if (ours && std::strcmp(creator->getPluginName(), name) == 0)
        {
            return creator;
        }
    }
    return nullptr;
}

template <typename Capability>
Capability* capability(IPluginV3& plugin, PluginCapabilityType type)
{
    return static_cast<Capability*>(plugin.getCapabilityInterface(type));
}

// As an engine holds them: a copy that outlives the plugin.
struct Serialized
{
    std::vector<std::string> names, data;
    std::vector<PluginField> fields;
    PluginFieldCollection collection{};

    explicit Serialized(PluginFieldCollection const& from)
    {
        for (int32_t place = 0; place < from.nbFields; ++place)
        {
            PluginField const& field = from.fields[place];
            names.emplace_back(field.name);
            data.emplace_back(static_cast<char const*>(field.data), field.length * sizeof(int32_t));
        }
        for (int32_t place = 0; place < from.nbFields; ++place)
        {
            fields.emplace_back(names[place].c_str(), data[place].data(), from.fields[place].type, from.fields[place].length);
        }
        collection = {static_cast<int32_t>(fields.size()), fields.data()};
    }
};

char const* built(IPluginV3& plugin, std::vector<Tensor> const& inputs, std::vector<Tensor> const& outputs)
{
    auto* const build = capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
    auto const input_count = static_cast<int32_t>(inputs.size());
    auto const output_count = static_cast<int32_t>(outputs.size());
    if (build->getNbOutputs() != output_count)
    {
        return "number of outputs";
    }
    std::vector<DataType> types, made(outputs.size());
    for (Tensor const& input : inputs)
    {
        types.push_back(static_cast<DataType>(input.type));
    }
    if (build->getOutputDataTypes(made.data(), output_count, types.data(), input_count) != 0)
    {
        return "output types";
    }
    for (int32_t place = 0; place < output_count; ++place)
    {
        if (static_cast<int32_t>(made[place]) != outputs[place].type)
        {
            return "another output type";
        }
    }

    std::vector<Size> sizes(8);
    std::vector<DimsExprs> shapes(inputs.size()), result(outputs.size());
    shapes[0].nbDims = inputs[0].rank;
    for (int32_t axis = 0; axis < inputs[0].rank; ++axis)
    {
        shapes[0].d[axis] = &sizes[axis];
    }
    Expressions expressions;
    if (build->getOutputShapes(shapes.data(), input_count, nullptr, 0, result.data(), output_count, expressions) != 0)
    {
        return "output shapes";
    }
    for (DimsExprs const& shape : result)
    {
        if (shape.nbDims != shapes[0].nbDims || !std::equal(shape.d, shape.d + shape.nbDims, shapes[0].d))
        {
            return "another output shape";
        }
    }

    std::vector<DynamicPluginTensorDesc> tensors;
    for (std::vector<Tensor> const* list : {&inputs, &outputs})
    {
        for (Tensor const& tensor : *list)
        {
            Dims const dims = dims_of(tensor.rank, tensor.dims);
            tensors.push_back({described(tensor, true), dims, dims, dims});
        }
    }
    for (int32_t position = 0; position < input_count + output_count; ++position)
    {
        if (!build->supportsFormatCombination(position, tensors.data(), input_count, output_count))
        {
            return "format";
        }
    }
    if (build->configurePlugin(tensors.data(), input_count, tensors.data() + input_count, output_count) != 0)
    {
        return "configure";
    }
    return build->getWorkspaceSize(tensors.data(), input_count, tensors.data() + input_count, output_count) ? "workspace"
                                                                                                            : nullptr;
}

char const* enqueued(IPluginV3& plugin, std::vector<Tensor> const& inputs, std::vector<Tensor> const& outputs)
{
    auto* const runtime = capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
    std::vector<PluginTensorDesc> from, to;
    std::vector<void const*> read;
    std::vector<void*> written;
    for (Tensor const& tensor : inputs)
    {
        from.push_back(described(tensor, false));
        read.push_back(tensor.data);
    }
    for (Tensor const& tensor : outputs)
    {
        to.push_back(described(tensor, false));
        written.push_back(tensor.data);
    }
    auto const input_count = static_cast<int32_t>(inputs.size());
    if (runtime->onShapeChange(from.data(), input_count, to.data(), static_cast<int32_t>(outputs.size())) != 0)
    {
        return "shape change";
    }
    return runtime->enqueue(from.data(), to.data(), read.data(), written.data(), nullptr, nullptr) ? "enqueue" : nullptr;
}

} // namespace

extern "C" char const* logged()
{
    return messages.c_str();
}

// Null, or the step that failed; logged() has the messages. output_dtype 0 gives no field.
extern "C" char const* live(char const* name, int32_t output_dtype, int32_t input_count, Tensor const* inputs,
    int32_t output_count, Tensor const* outputs)
{
    messages.clear();
    setLoggerFinder(&finder);
    std::vector<Tensor> const from(inputs, inputs + input_count), to(outputs, outputs + output_count);
    IPluginCreatorV3One* const creator = creator_of(name);
    if (!creator)
    {
        return "no creator";
    }
    std::vector<PluginField> fields{
        {"plugin_namespace", "dyt", PluginFieldType::kCHAR, 3}, {"plugin_version", "1", PluginFieldType::kCHAR, 1}};
    if (output_dtype != 0)
    {
        fields.emplace_back("output_dtype", &output_dtype, PluginFieldType::kINT32, 1);
    }
    PluginFieldCollection const given{static_cast<int32_t>(fields.size()), fields.data()};
    std::unique_ptr<IPluginV3> first{creator->createPlugin("layer", &given, TensorRTPhase::kBUILD)};
    if (!first)
    {
        return "create";
    }
    std::unique_ptr<IPluginV3> copy{first->clone()};
    first.reset();
    if (char const* const failed = built(*copy, from, to))
    {
        return failed;
    }
    Serialized const serialized{
        *capability<IPluginV3OneRuntime>(*copy, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize()};
    copy.reset();
    std::unique_ptr<IPluginV3> again{creator->createPlugin("layer", &serialized.collection, TensorRTPhase::kRUNTIME)};
    if (!again)
    {
        return "recreate";
    }
    auto* const core = capability<IPluginV3OneCore>(*again, PluginCapabilityType::kCORE);
    if (std::strcmp(core->getPluginName(), name) != 0)
    {
        return "another name";
    }
    auto* const runtime = capability<IPluginV3OneRuntime>(*again, PluginCapabilityType::kRUNTIME);
    std::unique_ptr<IPluginV3> attached{runtime->attachToContext(nullptr)};
    again.reset();
    return enqueued(*attached, from, to);
}
