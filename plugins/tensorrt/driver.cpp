#include "driver.h"

#include <dlfcn.h>

#include <string>

namespace keysieve {
namespace {

constexpr char const* kLibrary = "libcuda.so.1";
constexpr int kComputeCapabilityMajor = 75;
constexpr int kComputeCapabilityMinor = 76;

Driver const* replacement_ = nullptr;

template <typename Function>
void find(void* library, char const* symbol, Function*& function) {
    void* address = dlsym(library, symbol);
    if (address == nullptr) {
        throw Error(std::string("the NVIDIA driver lacks ") + symbol + "; the kernels need driver 525 (CUDA 12.0) or newer");
    }
    function = reinterpret_cast<Function*>(address);
}

Driver open() {
    void* library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        char const* reason = dlerror();
        throw Error(std::string("no NVIDIA driver: ") + (reason == nullptr ? kLibrary : reason));
    }
    Driver found{};
    find(library, "cuInit", found.init);
    find(library, "cuCtxGetDevice", found.currentDevice);
    find(library, "cuDeviceGetAttribute", found.deviceAttribute);
    find(library, "cuLibraryLoadData", found.libraryLoadData);
    find(library, "cuLibraryGetKernel", found.libraryGetKernel);
    find(library, "cuLaunchKernel", found.launch);
    find(library, "cuMemcpyHtoDAsync_v2", found.copyToDevice);
    find(library, "cuMemcpyDtoDAsync_v2", found.copyOnDevice);
    find(library, "cuStreamIsCapturing", found.isCapturing);
    find(library, "cuMemAlloc_v2", found.allocate);
    find(library, "cuMemFree_v2", found.free);
    find(library, "cuGetErrorName", found.errorName);
    find(library, "cuGetErrorString", found.errorText);
    return found;
}

} // namespace

Driver const& driver() {
    if (replacement_ != nullptr) {
        return *replacement_;
    }
    static Driver const found = open(); // tried again on the next call if it throws
    return found;
}

void replaceDriver(Driver const* replacement) { replacement_ = replacement; }

void check(Status status, char const* what) {
    if (status == kSuccess) {
        return;
    }
    char const* name = nullptr;
    char const* text = nullptr;
    driver().errorName(status, &name);
    driver().errorText(status, &text);
    std::string message = std::string(what) + " failed: ";
    message += name == nullptr ? "CUDA error " + std::to_string(status) : std::string(name);
    throw Error(text == nullptr ? message : message + " (" + text + ")");
}

int currentArchitecture() {
    int device = 0;
    int major = 0;
    int minor = 0;
    check(driver().currentDevice(&device), "cuCtxGetDevice");
    check(driver().deviceAttribute(&major, kComputeCapabilityMajor, device), "cuDeviceGetAttribute");
    check(driver().deviceAttribute(&minor, kComputeCapabilityMinor, device), "cuDeviceGetAttribute");
    return 10 * major + minor;
}

} // namespace keysieve
