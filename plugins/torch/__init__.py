"""The torch carrier: the contract as custom ops, the forms that work in place, and the Triton kernels behind both."""
