"""The operators under the names and conventions of other people's code."""
