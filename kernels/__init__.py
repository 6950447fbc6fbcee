"""The three eviction kernels: update, score and select; `reference` is their specification in plain torch."""

SCOPES = ("per_layer_per_head", "per_head", "union")  # what shares one choice of rows
