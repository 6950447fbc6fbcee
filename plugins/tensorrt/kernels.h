// Which image of a kernel runs on a GPU, loading it, and launching it.
#pragma once

#include "configuration.h"
#include "driver.h"

#include <string>
#include <vector>

namespace keysieve {

// A kernel's parameters: pointers as 64 bit, integers as 32 bit, in the order of its declaration.
class Arguments {
public:
    Arguments& pointer(void const* value);
    Arguments& pointer(DevicePointer value);
    Arguments& integer(int64_t value); // throws Error unless it fits 32 bit

    size_t size() const { return values_.size(); }
    uint64_t value(size_t index) const { return values_[index]; }
    std::vector<void*> addresses();

private:
    std::vector<uint64_t> values_; // a 32-bit integer is read from the low half
};

struct Launch {
    char const* kernel;
    int64_t batch;
    int64_t capacity;
    Arguments arguments;
};

// Blocks to launch; 0 where there is nothing to do. Throws Error beyond CUDA's limit.
unsigned gridOf(Image const& image, int64_t batch, int64_t capacity);

// The image of `kernel` for a GPU: the newest cubin of its generation that is not newer than the GPU, else PTX.
// Throws Error that lists what there is.
Image const& chooseImage(Image const* images, size_t count, std::string const& kernel, int architecture);

// Image and loaded kernel on the current device; loaded once a process and architecture.
struct Loaded {
    Image const* image;
    Handle kernel;
};
Loaded loadKernel(char const* kernel);

void launch(Launch work, Handle stream);

// Forget what was loaded (tests).
void forgetKernels();

} // namespace keysieve
