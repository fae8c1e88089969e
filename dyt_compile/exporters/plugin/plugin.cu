// The library: a creator for each form, and what TensorRT asks a library for.
//
// It exports getCreators and setLoggerFinder, registers nothing by itself and does not link
// libnvinfer: so one file serves TensorRT 10 and 11, whose registries differ. Load it with
// IPluginRegistry::loadLibrary, as trtexec --dynamicPlugins does; a dlopen alone registers nothing.
#include "plugin.h"

#include <NvInferVersion.h>

#include <cstring>
#include <memory>

#define DYT_EXPORT extern "C" __attribute__((visibility("default")))
#define DYT_TEXT(value) DYT_TEXT_OF(value)
#define DYT_TEXT_OF(...) #__VA_ARGS__

namespace dyt
{

using namespace nvinfer1;

class Creator final : public IPluginCreatorV3One
{
public:
    explicit Creator(Form const& form)
        : form_{form}
        , field_{kOUTPUT_DTYPE, nullptr, PluginFieldType::kINT32, 1}
        , fields_{form.quantize ? 1 : 0, &field_}
    {
    }

    IPluginV3* createPlugin(
        AsciiChar const*, PluginFieldCollection const* fields, TensorRTPhase) noexcept override
    {
        return guarded<IPluginV3*>(form_, nullptr, [&]() -> IPluginV3* {
            int32_t const output_dtype = form_.quantize ? read_output_dtype(fields) : 0;
            if (form_.quantize && output_dtype != kONNX_INT8 && output_dtype != kONNX_FLOAT8E4M3FN)
            {
                log_error(form_, "output_dtype is " + std::to_string(output_dtype)
                        + "; allowed: 3 (INT8) and 17 (FLOAT8E4M3FN), as int32");
                return nullptr;
            }
            return new Plugin(form_, output_dtype);
        });
    }
    PluginFieldCollection const* getFieldNames() noexcept override
    {
        return &fields_;
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

private:
    // 0 where it is missing. Other fields are TensorRT's own: plugin_namespace, plugin_version.
    static int32_t read_output_dtype(PluginFieldCollection const* fields)
    {
        for (int32_t place = 0; fields && place < fields->nbFields; ++place)
        {
            PluginField const& field = fields->fields[place];
            bool const given = std::strcmp(field.name, kOUTPUT_DTYPE) == 0 && field.data && field.length == 1;
            if (given && field.type == PluginFieldType::kINT32)
            {
                return *static_cast<int32_t const*>(field.data);
            }
        }
        return 0;
    }

    Form const& form_;
    PluginField const field_;
    PluginFieldCollection const fields_;
};

std::vector<std::unique_ptr<Creator>> const& creators()
{
    static std::vector<std::unique_ptr<Creator>> const kCREATORS = [] {
        std::vector<std::unique_ptr<Creator>> made;
        for (Form const& form : forms())
        {
            made.push_back(std::make_unique<Creator>(form));
        }
        return made;
    }();
    return kCREATORS;
}

} // namespace dyt

DYT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder)
{
    dyt::logger_finder = finder;
}

DYT_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count)
{
    static std::vector<nvinfer1::IPluginCreatorInterface*> const kPOINTERS = [] {
        std::vector<nvinfer1::IPluginCreatorInterface*> made;
        for (auto const& creator : dyt::creators())
        {
            made.push_back(creator.get());
        }
        return made;
    }();
    count = static_cast<int32_t>(kPOINTERS.size());
    return kPOINTERS.data();
}

// What the library is, as JSON, for readers without TensorRT.
DYT_EXPORT char const* dyt_plugin_info()
{
    static std::string const kINFO = [] {
        std::string listed;
        for (dyt::Form const& form : dyt::forms())
        {
            std::string inputs;
            for (dyt::Input input : form.inputs)
            {
                inputs += (inputs.empty() ? "\"" : ", \"") + std::string(dyt::name_of(input)) + "\"";
            }
            listed += (listed.empty() ? "\"" : ", \"") + form.name + "\": [" + inputs + "]";
        }
        return "{\"namespace\": \"" + std::string(dyt::kNAMESPACE) + "\", \"version\": \"" + dyt::kVERSION
            + "\", \"tensorrt\": \"" DYT_TEXT(NV_TENSORRT_MAJOR) "." DYT_TEXT(NV_TENSORRT_MINOR)
            + "\", \"cuda\": " + std::to_string(CUDART_VERSION)
            + ", \"architectures\": [" DYT_TEXT(__CUDA_ARCH_LIST__) "], \"inputs\": {" + listed + "}}";
    }();
    return kINFO.c_str();
}
