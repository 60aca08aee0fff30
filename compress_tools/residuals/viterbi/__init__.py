"""The search for the best symbols of trellis codes: exact, in C++ or torch, with the same result."""
