"""The way from a HuggingFace model to a running engine, one step a file."""
