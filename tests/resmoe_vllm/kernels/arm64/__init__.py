"""The C++ kernel's ARM64 paths, cross-compiled and run by an emulator of the processor."""
