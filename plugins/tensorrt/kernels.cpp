#include "kernels.h"

#include <algorithm>
#include <limits>
#include <map>
#include <mutex>
#include <utility>

namespace keysieve {
namespace {

constexpr unsigned kWarp = 32;
constexpr int64_t kGridLimit = 2147483647;

std::mutex mutex_;
std::map<std::pair<std::string, int>, Loaded> loaded_; // by kernel and architecture

bool runsOn(Image const& image, int architecture) {
    if (image.portable) {
        return image.architecture <= architecture;
    }
    if (image.exact) {
        return image.architecture == architecture;
    }
    return image.architecture / 10 == architecture / 10 && image.architecture <= architecture;
}

bool better(Image const& image, Image const& than) {
    if (image.portable != than.portable) {
        return !image.portable;
    }
    return std::make_pair(image.architecture, image.exact) > std::make_pair(than.architecture, than.exact);
}

std::string listed(Image const* images, size_t count, std::string const& kernel) {
    std::string text;
    for (size_t i = 0; i < count; ++i) {
        if (kernel == images[i].kernel) {
            text += (text.empty() ? "" : ", ") + std::string(images[i].portable ? "PTX for compute_" : "sm_")
                + std::to_string(images[i].architecture) + (images[i].exact ? "a" : "");
        }
    }
    return text.empty() ? "nothing" : text;
}

Handle load(Image const& image, int architecture) {
    Handle library = nullptr;
    Status const status = driver().libraryLoadData(&library, image.data, nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (status == kUnsupportedPtx) {
        throw Error(std::string(image.kernel) + " has no cubin for sm_" + std::to_string(architecture)
            + ", and its PTX is too new for this driver; update the driver, or build the plugin with --arch "
            + std::to_string(architecture));
    }
    check(status, "cuLibraryLoadData");
    Handle kernel = nullptr;
    check(driver().libraryGetKernel(&kernel, library, image.entry), "cuLibraryGetKernel");
    return kernel;
}

} // namespace

Arguments& Arguments::pointer(void const* value) { return pointer(static_cast<DevicePointer>(reinterpret_cast<uintptr_t>(value))); }

Arguments& Arguments::pointer(DevicePointer value) {
    values_.push_back(value);
    return *this;
}

Arguments& Arguments::integer(int64_t value) {
    if (value < 0 || value > std::numeric_limits<int32_t>::max()) {
        throw Error("size " + std::to_string(value) + " does not fit a kernel's 32-bit parameter");
    }
    values_.push_back(static_cast<uint64_t>(value));
    return *this;
}

std::vector<void*> Arguments::addresses() {
    std::vector<void*> result(values_.size());
    std::transform(values_.begin(), values_.end(), result.begin(), [](uint64_t& value) { return &value; });
    return result;
}

Image const& chooseImage(Image const* images, size_t count, std::string const& kernel, int architecture) {
    Image const* best = nullptr;
    for (size_t i = 0; i < count; ++i) {
        Image const& image = images[i];
        if (kernel == image.kernel && runsOn(image, architecture) && (best == nullptr || better(image, *best))) {
            best = &image;
        }
    }
    if (best == nullptr) {
        throw Error(kernel + " does not run on sm_" + std::to_string(architecture) + ": the library has "
            + listed(images, count, kernel) + "; build it with --arch " + std::to_string(architecture));
    }
    return *best;
}

Loaded loadKernel(char const* kernel) {
    int const architecture = currentArchitecture();
    std::lock_guard<std::mutex> const lock(mutex_);
    auto const key = std::make_pair(std::string(kernel), architecture);
    auto const found = loaded_.find(key);
    if (found != loaded_.end()) {
        return found->second;
    }
    Image const& image = chooseImage(images, imageCount, kernel, architecture);
    Loaded const result{&image, load(image, architecture)};
    loaded_.emplace(key, result);
    return result;
}

unsigned gridOf(Image const& image, int64_t batch, int64_t capacity) {
    auto const rows = static_cast<int64_t>(image.gridRows);
    int64_t const parts = static_cast<int64_t>(image.gridCells) * batch * (rows == 0 ? 1 : (capacity + rows - 1) / rows);
    int64_t const blocks = std::min(parts, static_cast<int64_t>(image.gridMost));
    // A kernel whose blocks share the parts has a bound; that of the others is all that CUDA allows.
    if (parts > kGridLimit && blocks == kGridLimit) {
        throw Error(std::string(image.kernel) + " would need " + std::to_string(parts) + " blocks; CUDA allows "
            + std::to_string(kGridLimit) + ", so use a smaller batch");
    }
    return static_cast<unsigned>(blocks);
}

void launch(Launch work, Handle stream) {
    Loaded const loaded = loadKernel(work.kernel);
    Image const& image = *loaded.image;
    unsigned const blocks = gridOf(image, work.batch, work.capacity);
    if (blocks == 0) {
        return;
    }
    while (work.arguments.size() < image.parameters) {
        work.arguments.pointer(nullptr);
    }
    std::vector<void*> addresses = work.arguments.addresses();
    check(driver().launch(loaded.kernel, blocks, 1, 1, image.warps * kWarp, 1, 1, image.sharedBytes, stream, addresses.data(),
              nullptr),
        (std::string("cuLaunchKernel of ") + work.kernel).c_str());
}

void forgetKernels() {
    std::lock_guard<std::mutex> const lock(mutex_);
    loaded_.clear();
}

} // namespace keysieve
