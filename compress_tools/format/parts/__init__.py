"""The parts of a layer's coding: one file per way of storing rows; each class answers for what it stores."""
