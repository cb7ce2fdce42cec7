"""Files of the Triton model that turns text into the inputs of a graph; they import nothing of enginesmith."""
