"""Changes of a checkpoint's form: dtypes, layouts, tied heads, vocabulary."""
