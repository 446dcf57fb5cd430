"""How NP components get values: a closed form from a few thousand tokens of text, or a random start. Reading order: ``apply``
(the order of events), ``calibrate`` (tokens → components), then what each step computes; ``quantise`` comes before all of it.
"""
