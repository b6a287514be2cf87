"""The operators: formula, schema, reference, fakes, autograd and public function of each, one stem a file."""
