"""The contract of the three eviction ops and its carriers."""
