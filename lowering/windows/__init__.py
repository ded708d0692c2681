"""The windows of an image as columns of a matrix, which a convolution multiplies: an exact copy, on the CPU."""
