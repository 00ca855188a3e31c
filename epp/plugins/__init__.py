"""Policies: one class in one file each. See base for what a plugin is, registry for how one is found."""
