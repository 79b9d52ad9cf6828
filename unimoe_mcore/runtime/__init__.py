"""What a run stands on: devices, kernels, process groups."""
