"""Maps that were learned elsewhere: matrices of axes and layer weights, and what they keep."""
