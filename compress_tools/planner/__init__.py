"""The planner: a byte budget in, how each layer and projection is stored out, at the least total error."""
