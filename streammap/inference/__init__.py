"""Inference of specs: a model class is probed on the meta device, one config field at a time."""
