"""CPU kernels of our own, in C++: built on first use, and never needed."""
