"""Typed clients of models: from a model's interface to a Python module.

``source`` finds the interface, ``module`` writes the code with ``arrays`` and ``texts`` (the methods), ``layout`` and
``names`` (how code and names of a model become Python).
"""
