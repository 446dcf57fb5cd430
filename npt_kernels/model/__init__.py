"""A converted model: the shapes of decoder layers, the layer's maths, patching on the instance, saving."""
