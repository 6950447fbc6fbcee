// KeySieveMatMul: x [...,K] times weight [N,K] -> [...,N], float32, on the weights as they lie in the file.
//
// norm [K] and residual [...,N] are those of KeySieveLinear.
//
// ONNX Runtime's MatMul turns and packs a copy of them, and reads it as one stream of memory.
#pragma once

#include "op.h"

namespace keysieve {

class MatMul {
public:
    explicit MatMul(Attributes const& attributes) : epsilon_(attributes.real("epsilon")) {}
    void compute(Context& context) const;

private:
    float epsilon_; // of the norm
};

} // namespace keysieve
