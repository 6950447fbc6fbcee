"""Test support: tiny models and the slow references that the engine is compared with."""
