"""Kinds of derived tensors (graph.Derived): what operators that are not linear build on."""
