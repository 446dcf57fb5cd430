"""A converted model. Reading order: ``shapes/`` (families of layers), ``layer`` (the maths of a converted one), ``select``
(which layers), ``install`` (on the instance, and off again), ``visits`` (the original run, every layer met), ``save``.
"""
