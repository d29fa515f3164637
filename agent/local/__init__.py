"""The local API: inference for other programs on this device."""
