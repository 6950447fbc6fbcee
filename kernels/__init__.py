"""The three eviction kernels: update, score and select; `reference` is their specification in plain torch."""
