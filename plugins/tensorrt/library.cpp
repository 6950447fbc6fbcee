// What the shared library exports.

#include "plugin.h"

#define KEYSIEVE_EXPORT extern "C" __attribute__((visibility("default")))

// TensorRT calls these two when it loads the library.
KEYSIEVE_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[]
        = {keysieve::updateCreator(), keysieve::scoreCreator(), keysieve::selectCreator()};
    count = 3;
    return creators;
}

// Its logger's interface differs between versions of TensorRT, so messages go to stderr and to the error recorder.
KEYSIEVE_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder*) {}

// What the library was built for, JSON; read before an engine is built.
KEYSIEVE_EXPORT char const* keysieve_description() { return keysieve::description; }

// The last error any plugin reported since the last call, or "".
KEYSIEVE_EXPORT char const* keysieve_last_error() { return keysieve::takeLastError(); }
