class DelayedScaling:
    """Named as a base class by Megatron; 8-bit formats are not used here."""
