class QuantizedTensor:
    """Megatron asks whether a parameter is one; none is."""
