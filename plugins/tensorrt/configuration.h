// What a plugin library was built for: the sizes baked into its kernels, and their images. Defined by generated code.
#pragma once

#include "abi.h"

#include <cstddef>
#include <cstdint>

namespace keysieve {

struct Configuration {
    int32_t layers;
    int32_t queryHeads;
    int32_t kvHeads;
    int32_t headDim;
    int32_t valueDim;
    int32_t offsets; // J, rows of a query centre
    int32_t rotaryDim;
    int32_t interleaved;
    int32_t sinks;
    int32_t recent;
    int32_t aliased; // whether update declares its outputs to be its input caches
    char const* policy;
    char const* scope;
    nvinfer1::DataType cacheType;

    int32_t planLayers() const; // Lp
    int32_t planHeads() const;  // Hp
    bool needsStats() const;    // whether select begins with a launch of select_stats
};

// One kernel for one architecture. Its grid has min(gridMost, gridCells * B * ceil(C / gridRows)) blocks; no rows to
// divide by where gridRows is 0.
struct Image {
    char const* kernel;   // update, score, select_stats or select_plan
    int32_t architecture; // 80 for sm_80
    bool portable;        // PTX: any GPU of this architecture or later, compiled by the driver
    bool exact;           // sm_90a and the like: this architecture and no other
    unsigned char const* data;
    size_t size;
    char const* entry; // symbol of the kernel
    uint32_t warps;
    uint32_t sharedBytes;
    uint32_t parameters; // in all; those at the end that no launch gives are scratch pointers of Triton's, null here
    uint32_t gridCells;
    uint32_t gridRows;
    uint32_t gridMost;
};

extern Configuration const configuration;
extern Image const images[];
extern size_t const imageCount;
extern char const* const description; // of configuration and images, JSON

} // namespace keysieve
