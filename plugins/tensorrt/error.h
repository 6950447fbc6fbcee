// Errors inside the library. They are thrown here and caught at TensorRT's boundary, which no exception may cross.
#pragma once

#include <stdexcept>
#include <string>

namespace keysieve {

class Error : public std::runtime_error {
public:
    using std::runtime_error::runtime_error;
};

} // namespace keysieve
