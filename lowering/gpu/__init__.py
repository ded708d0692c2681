"""What the GPU kernels of all families share: devices, launching, and the admission of schedules."""
