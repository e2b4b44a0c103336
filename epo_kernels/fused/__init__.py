"""From row kernels to differentiable losses, the same for every backend."""
